"""Which marks a tokenizer puts around a text, and which tokens end a reply: asked, where the files leave it open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.pretokenizers import ADDING_BOS
from convert.vocabulary import Vocabulary, translated


def settle_added_marks(path: Path, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Say what `tokenizer` does wherever llama.cpp would assume something else. Raises TokenizerError."""
    with translated(path):
        marked = tokenizer.encode("a").ids
        plain = tokenizer.encode("a", add_special_tokens=False).ids
    around = _around(marked, plain)
    if around is None:
        return
    assumed = {
        "bos": vocabulary.model == "llama" or vocabulary.pre in ADDING_BOS,
        "eos": vocabulary.model == "t5",
    }
    special = vocabulary.special
    for kind, marks in zip(("bos", "eos"), around, strict=True):
        if not marks and assumed[kind]:
            special.add.setdefault(kind, False)
        elif len(marks) == 1 and not special.add.get(kind, assumed[kind]):
            special.ids[kind], special.add[kind] = marks[0], True
    if max(map(len, around)) > 1:
        vocabulary.notes.append(
            f"the tokenizer puts {len(around[0])} special tokens before a text and {len(around[1])} after it; "
            "llama.cpp puts one at most, so a prompt should hold them, as the chat template has it"
        )


def _around(marked: list[int], plain: list[int]) -> tuple[list[int], list[int]] | None:
    for at in range(len(marked) - len(plain) + 1):
        if marked[at : at + len(plain)] == plain:
            return marked[:at], marked[at + len(plain) :]
    return None


def settle_ends(vocabulary: Vocabulary) -> None:
    """Name the tokens that the configs let end a reply, where llama.cpp would not see it by their text.

    It has three roles for such a token: eos, eot and eom. To be called where llama.cpp is loaded anyway.
    """
    special = vocabulary.special
    further = [i for i in special.ends if i != special.ids.get("eos") and i < len(vocabulary.tokens)]
    if not further:
        return
    from convert.trial import ending_tokens

    known = ending_tokens(vocabulary)
    unknown = [i for i in further if i not in known]
    for kind in ("eot", "eom"):
        if unknown and kind not in special.ids:
            special.ids[kind] = unknown.pop(0)
    if unknown:
        vocabulary.notes.append(f"llama.cpp has no further role for the tokens {unknown}, which end a reply, too")

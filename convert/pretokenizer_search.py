"""The pre-tokenizer of a byte-level BPE that llama.cpp does not know by its hash: all that it has are tried."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.search_text import search_texts
from convert.vocabulary import TokenType, UnsupportedTokenizer, Vocabulary, translated
from models.text import printable

if TYPE_CHECKING:
    from convert.trial import Difference

# One name for each way of splitting in llama.cpp (src/llama-vocab.cpp, llm_tokenizer_bpe), and whether a word that is
# itself a token is taken whole (`ignore_merges`). The common ones come first, and of two the one that splits finer:
# a tokenizer that does not shows it by its tokens, while one that does may have none that would tell.
PRETOKENIZERS = {
    "qwen2": False,
    "smollm": False,
    "gpt-2": False,
    "smaug-bpe": False,  # splits as llama-bpe
    "llama-bpe": True,
    "tekken": True,
    "gpt-4o": False,
    "deepseek-v3": False,
    "deepseek-llm": False,
    "deepseek-coder": False,
    "falcon": False,
    "qwen35": False,
    "kimi-k2": False,
    "bailingmoe": False,
    "seed-coder": False,
    "superbpe": False,
    "minicpm5": True,
    "granite-embed-multi-97m": True,
    "tiny_aya": False,
    "jais-2": False,
    "spark2_5": False,
    "youtu": True,
    "poro-chat": False,
    "viking": False,
    "chameleon": False,
    "ufakzeka": False,
    "afmoe": False,
    "laguna": False,
    "exaone-moe": False,
    "default": False,
}


def find_pretokenizer(
    path: Path, vocabulary: Vocabulary, tokenizer: Any, ignores_merges: bool
) -> tuple[str, dict[str, list[int]]]:
    """The name of one that gives the very ids of `tokenizer` on a large text in many scripts; the text, and its ids.

    Raises UnsupportedTokenizer, which tells where the nearest one parts, and TokenizerError.
    """
    from convert.trial import make_trial  # takes longer to import than most tokenizers to read

    by_type = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    texts = search_texts(
        [token for token, kind in by_type if kind == TokenType.NORMAL],
        [token for token, kind in by_type if kind == TokenType.CONTROL],
    )
    with translated(path):
        expected = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}
    trial = make_trial(vocabulary, expected)
    nearest: tuple[str, Difference] | None = None
    for name in sorted(PRETOKENIZERS, key=lambda name: PRETOKENIZERS[name] != ignores_merges):
        difference = trial.first_difference(pre=name)
        if difference is None:
            return name, expected
        if nearest is None or _reach(difference) > _reach(nearest[1]):
            nearest = name, difference
    assert nearest is not None
    name, difference = nearest
    raise UnsupportedTokenizer(
        f"the tokenizer in {path} splits text as no pre-tokenizer of llama.cpp does: {name!r}, the nearest, parts "
        f"from it at {printable(difference.rest, 40)!r} in {printable(difference.text, 80)!r}",
        hint="A file made from it would read your text wrongly.",
        path=path,
        pretokenizer=name,
        text=difference.text,
    )


def _reach(difference: Difference) -> tuple[int, int]:
    return difference.n_equal, -len(difference.rest)

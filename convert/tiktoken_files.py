"""Vocabularies as tiktoken keeps them: a line for each token, its bytes in base64 and its rank.

How a text is split stands in Python code that no file of data repeats. Each known way is tried: the ids that come of
it for one text have a hash that llama.cpp knows, or they do not.
"""

from __future__ import annotations

import base64
import binascii
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from convert import pretokenizers
from convert.checkpoint import MAX_JSON_BYTES
from convert.documents import MAX_TOKEN_BYTES, Json, added_token, byte_level_document, merges_of_ranks, spelled
from convert.vocabulary import UnsupportedTokenizer, translated
from models.errors import TokenizerError

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
CL100K = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}|" + _REST
)
_CASED = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_CONTRACTION}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_CONTRACTION}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = (QWEN, CL100K, O200K, KIMI)

# tokenization_qwen.py of Qwen 1: these follow the ranks.
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

_NAMES = ("qwen.tiktoken", "tokenizer.tiktoken", "tiktoken.model", "tokenizer.model")


def tiktoken_file(path: Path) -> Path | None:
    """The file of this form in a checkpoint's folder, if it has one."""
    others = sorted(path.glob("*.tiktoken"))
    for candidate in (*(path / name for name in _NAMES), *others):
        if candidate.is_file() and (candidate.suffix == ".tiktoken" or is_tiktoken(candidate)):
            return candidate
    return None


def is_tiktoken(path: Path) -> bool:
    """Whether a file called `*.model` is a list of ranks: the same name is SentencePiece's."""
    with path.open("rb") as file:
        line = file.readline(4096)
    try:
        token, rank = line.split()
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except (ValueError, binascii.Error):
        return False


def read_tiktoken(path: Path, config: dict[str, Any]) -> Json:
    """The file `path` as tokenizer.json, with the special tokens that `config` (tokenizer_config.json) lists.

    Raises TokenizerError, UnsupportedTokenizer.
    """
    import tokenizers

    ranks = _ranks(path)
    merges = [(spelled(left), spelled(right)) for left, right in merges_of_ranks(ranks)]
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    added = _special_tokens(path, ranks, config)
    document = byte_level_document(vocab, merges, added, pattern=QWEN, ignore_merges=True)
    if path.name == "qwen.tiktoken":
        return document | {"normalizer": {"type": "NFC"}}
    with translated(path.parent, path.name):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
        for pattern in _PATTERNS:
            candidate = byte_level_document(vocab, merges, added, pattern=pattern, ignore_merges=True)
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters])
            if _is_known(tokenizer, added, config):
                return candidate
    raise UnsupportedTokenizer(
        f"{path} does not say how a text is split, and no known way gives ids that llama.cpp knows",
        hint="Load it with transformers' AutoTokenizer and save it again: that writes tokenizer.json.",
        path=path.parent,
    )


def _is_known(tokenizer: Any, added: list[Json], config: dict[str, Any]) -> bool:
    ids = tokenizer.encode(pretokenizers.PROBE_TEXT).ids
    by_text = {entry["content"]: entry["id"] for entry in added}
    bos = config.get("bos_token")
    named = bos.get("content") if isinstance(bos, dict) else bos
    # what may stand before a text: nothing, BOS, or the two marks of GLM-4
    begins = [[by_text[text] for text in texts if text in by_text] for texts in ((), (named,), ("[gMASK]", "<sop>"))]
    return any(sha256(str(begin + ids).encode()).hexdigest() in pretokenizers.NAMES for begin in begins)


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes", path=path.parent)
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            token, rank = line.split()
            decoded = base64.b64decode(token, validate=True)
            if not 0 < len(decoded) <= MAX_TOKEN_BYTES or decoded in ranks or len(rank) > 9:
                raise ValueError(f"line {number} has an empty, too long or repeated token")
            ranks[decoded] = int(rank)
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}", path=path.parent) from error
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path} is not a tiktoken vocabulary: {error}", path=path.parent) from error
    if not ranks or min(ranks.values()) < 0 or len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{path} is not a tiktoken vocabulary: its ranks are not one for each", path=path.parent)
    return ranks


def _special_tokens(path: Path, ranks: dict[bytes, int], config: dict[str, Any]) -> list[Json]:
    first = max(ranks.values()) + 1
    if path.name == "qwen.tiktoken":
        return [added_token(text, first + i) for i, text in enumerate(_QWEN_SPECIAL)]
    decoder = config.get("added_tokens_decoder")
    return [
        added_token(str(entry.get("content", "")), int(key), special=entry.get("special") is not False)
        for key, entry in (decoder if isinstance(decoder, dict) else {}).items()
        if key.isascii() and key.isdecimal() and len(key) < 10 and isinstance(entry, dict)
    ]

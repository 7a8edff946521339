"""What a converted file must do before it is called done: tokenize as its tokenizer does, and compute."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from models.errors import CheckFailed, HandmillError
from models.native import forward_pass, open_vocabulary

CHECK_TEXTS = (
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "请解释Transformer模型中的注意力机制是如何工作的。",
    "人工智能(AI)在2024年的发展:机遇与挑战——“我们准备好了吗?”",
    "日本語のテキストとひらがな、カタカナ。한국어 문장도 있습니다.",
    "Привет, как дела? Добрый день!",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "Ça va très bien, merci. Übergröße, naïve café, señor, Đặng Thị.",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🇫🇷 ✅🚀 emoji in a row 😀😃😄",
    "def f(x):\n    return x ** 2 + 1\n\n\tif x >= 10: print(f\"{x!r}\")\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0.5e-3; } // done\n#include <stdio.h>",
    "1 12 123 1234 12345 123456 3.14159 1,000,000 0xFF 2024-01-31T12:00:00Z",
    " leading space", "two  spaces   three    four", "tab\there\t\tand\n\nblank lines\n\n\n", "trailing  ",
    "I'm you're HE'LL they've we'd isn't don'T",
    "https://example.org/path?q=a%20b&c=d#frag user@example.com C:\\Temp\\x.txt",
    "ALLCAPS camelCase snake_case kebab-case x²+y³≠z½ €100 £5 ©®™",
)  # fmt: skip

_FORWARD_TOKENS = 2

# On these llama.cpp is known to part from tokenizers that normalise (it does not), or split marks off letters.
LIMIT_TEXTS = (
    "de\u0301compose\u0301 e\u0301 a\u0300 n\u0303",
    "नमस्ते दुनिया, यह एक परीक्षण है",
    "สวัสดีชาวโลก ทดสอบ",
)


def check_vocabulary(path: Path, expected_ids: Mapping[str, list[int]], limits: Collection[str]) -> list[str]:
    """Hold the vocabulary of a file against the ids of its Hugging Face tokenizer. The weights may not be there yet.

    On the texts in `limits` llama.cpp is known to part from that tokenizer: warnings are returned for these.
    Raises CheckFailed.
    """
    warnings = []
    with _translated(), open_vocabulary(path) as vocabulary:
        for text, expected in expected_ids.items():
            ids = vocabulary.tokenize(text, add_special=False, parse_special=False)
            if ids == expected:
                continue
            if text in limits:
                warnings.append(f"llama.cpp tokenizes {text!r} otherwise than the model learnt it (a known limit)")
                continue
            raise CheckFailed(
                f"llama.cpp tokenizes {text!r} to other ids than the checkpoint's tokenizer: "
                f"{_first_difference(ids, expected)}",
                hint="The model would read your text wrongly. --no-check writes the file all the same.",
                text=text,
            )
    return warnings


def check_computation(
    path: Path, expected_ids: Mapping[str, list[int]], *, architecture: str, n_vocab: int, threads: int
) -> None:
    """Run one forward pass over the file. Raises CheckFailed if llama.cpp cannot, or the logits are not finite."""
    tokens = next((ids for ids in expected_ids.values() if ids), [0])
    # The vocabulary was checked on its own; a large one takes longer to load than the pass.
    no_vocabulary: dict[str, int | str] = {"tokenizer.ggml.model": "none", f"{architecture}.vocab_size": n_vocab}
    with _translated():
        logits = forward_pass(path, tokens[:_FORWARD_TOKENS], threads=threads, overrides=no_vocabulary)
    if not np.isfinite(logits).all():
        raise CheckFailed(
            "a forward pass gives NaN or infinite logits",
            hint="The weights do not hold in this type. Try --type BF16 or F32 to see whether they are sound.",
        )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except CheckFailed:
        raise
    except HandmillError as error:
        raise CheckFailed(f"llama.cpp does not run the file: {error}", hint=error.hint) from error


def _first_difference(ids: list[int], expected: list[int]) -> str:
    for i, (ours, theirs) in enumerate(zip(ids, expected, strict=False)):
        if ours != theirs:
            return f"at token {i}, {ours} instead of {theirs}"
    return f"{len(ids)} tokens instead of {len(expected)}"

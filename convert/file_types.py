"""The file types of llama.cpp, as data: nothing heavy is imported to list what `handmill convert --type` takes."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import UsageError
from models.text import printable


@dataclass(frozen=True)
class FileType:
    """A recipe that gives every tensor its type: `Q4_K_M` as against the tensor type `Q4_K`.

    `id` is llama.cpp's `LLAMA_FTYPE_*`. `bits_per_weight` is that of Llama 3 8B, by llama.cpp's own plan (a test
    holds the figures). A type that `needs_matrix` is known only to be refused by name.
    """

    name: str
    id: int
    bits_per_weight: float
    needs_matrix: bool = False


FILE_TYPES = {
    t.name: t
    for t in (
        FileType("F32", 0, 32.0),
        FileType("BF16", 32, 16.0),
        FileType("F16", 1, 16.0),
        FileType("Q8_0", 7, 8.5),
        FileType("Q6_K", 18, 6.56),
        FileType("Q5_K_M", 17, 5.7),
        FileType("Q5_K_S", 16, 5.57),
        FileType("Q5_1", 9, 6.04),
        FileType("Q5_0", 8, 5.57),
        FileType("Q4_K_M", 15, 4.89),
        FileType("Q4_K_S", 14, 4.67),
        FileType("Q4_1", 3, 5.1),
        FileType("Q4_0", 2, 4.64),
        FileType("IQ4_NL", 25, 4.68),
        FileType("IQ4_XS", 30, 4.46),
        FileType("MXFP4_MOE", 38, 8.5),
        FileType("Q3_K_L", 13, 4.3),
        FileType("Q3_K_M", 12, 4.0),
        FileType("Q3_K_S", 11, 3.64),
        FileType("IQ3_M", 27, 3.76),
        FileType("IQ3_S", 26, 3.66),
        FileType("IQ3_XS", 22, 3.5, needs_matrix=True),
        FileType("IQ3_XXS", 23, 3.2, needs_matrix=True),
        FileType("Q2_K", 10, 3.16),
        FileType("Q2_K_S", 21, 2.96, needs_matrix=True),
        FileType("IQ2_M", 29, 2.9, needs_matrix=True),
        FileType("IQ2_S", 28, 2.7, needs_matrix=True),
        FileType("IQ2_XS", 20, 2.6, needs_matrix=True),
        FileType("IQ2_XXS", 19, 2.4, needs_matrix=True),
        FileType("TQ2_0", 37, 2.52),
        FileType("TQ1_0", 36, 2.19),
        FileType("Q2_0", 41, 2.68),
        FileType("Q1_0", 40, 1.48),
        FileType("IQ1_M", 31, 2.1, needs_matrix=True),
        FileType("IQ1_S", 24, 2.0, needs_matrix=True),
    )
}
DEFAULT = FILE_TYPES["Q4_K_M"]

# As llama-quantize has them.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def file_type(name: str) -> FileType:
    """A file type by its name in any case. Raises UsageError that lists those that can be made."""
    wanted = name.upper().replace("-", "_")
    found = FILE_TYPES.get(_ALIASES.get(wanted, wanted))
    if found is None:
        names = ", ".join(t.name for t in FILE_TYPES.values() if not t.needs_matrix)
        raise UsageError(f"unknown file type {printable(name, 40)!r}", hint=f"One of: {names}.")
    return found

"""Every supported architecture, as data.

A family is one `ModelFamily` value in a module of this package; the registry finds it there, so adding one is
adding a file. What varies by checkpoint (rope scaling, tokenizer, tied embeddings, biases) is read from the
checkpoint and is no part of a family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Literal

from models.errors import UnsupportedError
from models.families.vocabulary import DEFAULT as DEFAULT_VOCABULARY
from models.families.vocabulary import VocabularyRules

ExtraKey = Literal["vocab_size", "rope.dimension_count"]


@dataclass(frozen=True)
class ModelFamily:
    """Models that one GGUF architecture computes.

    architectures     the names in `architectures` of config.json
    gguf_arch         llama.cpp's name, also the prefix of the metadata keys
    defaults          what transformers assumes for a field that config.json leaves out
    interleaved_rope  llama.cpp rotates neighbouring rows of a head, transformers its two halves: the rows of
                      the query and key projections change places
    head_dim_key      key and value lengths are written even where they follow from the hidden size
    extra_keys        metadata that llama.cpp's converter writes for this architecture only
    vocabulary        what its vocabulary has that no file of a checkpoint says
    """

    architectures: tuple[str, ...]
    gguf_arch: str
    defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    interleaved_rope: bool = False
    head_dim_key: bool = False
    extra_keys: tuple[ExtraKey, ...] = ()
    vocabulary: VocabularyRules = DEFAULT_VOCABULARY


@cache
def registry() -> Mapping[str, ModelFamily]:
    """Hugging Face architecture name -> family. Raises ValueError if two families claim one name."""
    found: dict[str, ModelFamily] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for family in vars(module).values():
            if not isinstance(family, ModelFamily):
                continue
            for name in family.architectures:
                if found.setdefault(name, family) is not family:
                    raise ValueError(f"two families claim {name}")
    return MappingProxyType(found)


def family_of(architecture: str) -> ModelFamily:
    """The family of a Hugging Face architecture. Raises UnsupportedError, which names those that are known."""
    families = registry()
    if architecture not in families:
        raise UnsupportedError(
            f"architecture {architecture[:80]!r} is not supported",
            hint=f"Known architectures: {', '.join(sorted(families))}.",
            architecture=architecture,
        )
    return families[architecture]

"""Every supported architecture, as data.

A family is one `ModelFamily` value in a module of this package; the registry finds it there, so adding one is
adding a file. What varies by checkpoint (rope scaling, tokenizer, tied embeddings, biases) is read from the
checkpoint and is no part of a family.

`keys` names the metadata that differs from what all have (`keys.COMMON`), `passes` what happens to the tensors on
their way from the checkpoint's names to gguf's (`passes.py`). Facts: llama.cpp, conversion/*.py; transformers,
models/*/configuration_*.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from models.errors import UnsupportedError
from models.hparams import Hparams, Requirement
from models.vocabulary_rules import DEFAULT as DEFAULT_VOCABULARY
from models.vocabulary_rules import VocabularyRules
from models.weights import Weights

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]
Getter = Callable[[Hparams], Value | None]
"""The value of a metadata key; None leaves the key out. A list has one value a block, say."""

Tensors = Mapping[str, Weights]
Pass = Callable[[Tensors, Hparams], Tensors]
"""From tensors by name to tensors by name: renamed, split, dropped, changed."""


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class ModelFamily:
    """Models that one GGUF architecture computes.

    architectures  the names in `architectures` of config.json
    gguf_arch      llama.cpp's name, also the prefix of the metadata keys
    defaults       what transformers assumes for a field that config.json leaves out
    aliases        LlamaConfig's name of a field -> what this config calls it, where `config_fields.ALIASES` errs
    requires       field -> the only values that llama.cpp's graph computes
    ignored        fields that do not change what a token's logits are
    keys           metadata key without the architecture's prefix -> its value; "/key" has none
    passes         what is done to the tensors, one pass after the other
    n_blocks       how many blocks the file has, if not `num_hidden_layers`
    variant        another family for some configs of the same architecture
    note           what a person should know who converts one
    vocabulary     what its vocabulary has that no file of a checkpoint says
    """

    architectures: tuple[str, ...]
    gguf_arch: str
    defaults: Mapping[str, object] = field(default_factory=_nothing)
    aliases: Mapping[str, str] = field(default_factory=_nothing)
    requires: Mapping[str, Requirement] = field(default_factory=_nothing)
    ignored: tuple[str, ...] = ()
    keys: Mapping[str, Getter] = field(default_factory=_nothing)
    passes: tuple[Pass, ...] = ()
    n_blocks: Callable[[Hparams], int] = lambda hparams: hparams.n_layers
    variant: Callable[[Hparams], ModelFamily | None] = lambda hparams: None
    note: Callable[[Hparams], str | None] = lambda hparams: None
    vocabulary: VocabularyRules = DEFAULT_VOCABULARY

    def hparams(self, config: Mapping[str, Any], tensors: Tensors | None = None) -> Hparams:
        """The reader over a config of this family."""
        return Hparams(config, self.defaults, self.aliases, tensors)


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


def family_of(architecture: str, config: Mapping[str, Any] | None = None) -> ModelFamily:
    """The family of a Hugging Face architecture; with a config, the variant of it that the config describes.

    Raises UnsupportedError, which names those that are known.
    """
    families = registry()
    if architecture not in families:
        raise UnsupportedError(
            f"architecture {architecture[:80]!r} is not supported",
            hint=f"Known architectures: {', '.join(sorted(families))}.",
            architecture=architecture,
        )
    family = families[architecture]
    return family if config is None else family.variant(family.hparams(config)) or family

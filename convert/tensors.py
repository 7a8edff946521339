"""Which tensors the file gets, and from what: a plan that can be listed before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from convert.releases import too_old
from convert.rope_factors import rope_tensors
from convert.stored import check_readable
from models.errors import TensorError
from models.families import ModelFamily
from models.families.passes import stack_experts, without_other_parts
from models.hparams import Hparams
from models.text import printable
from models.weights import Weights

# Buffers that some checkpoints carry along; they follow from the config.
_IGNORED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".attn.bias", ".attn.masked_bias", ".inv_freq")

# Matrices that llama.cpp keeps in F32 whatever the file type. Source: conversion/base.py `prepare_tensors`.
_KEPT_F32 = re.compile(
    r".*_norm\.weight|position_embd\.weight|token_types\.weight"
    r"|blk\.\d+\.(ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d|shortconv\.conv|altup_correct_coef|altup_predict_coef)\.weight"
)


# The form of a name that a family gives itself
_GGUF_NAME = re.compile(r"blk\.\d+\.[a-z0-9_.]+\.(weight|bias|scale)|rope_freqs\.weight")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file before its type is known.

    name      GGUF name
    weights   its shape, and how its rows are read
    keep_f32  stays F32 whatever the file type (norms, biases)
    """

    name: str
    weights: Weights
    keep_f32: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape

    @property
    def row_length(self) -> int:
        """Of a row of the file: a vector is one."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.n_weights // self.row_length

    @property
    def n_weights(self) -> int:
        return self.weights.n_weights


def plan_tensors(tensors: Mapping[str, Weights], family: ModelFamily, hparams: Hparams) -> list[TensorPlan]:
    """The tensors of the file. Raises TensorError for one that nobody asked for, that is missing or misshapen."""
    n_blocks = family.n_blocks(hparams)
    if n_blocks > len(tensors):  # gguf lists the names of all blocks: not of 2^30
        raise TensorError(
            f"config.json asks for {n_blocks:,} blocks, the checkpoint has {len(tensors):,} tensors",
            hint="A shard is missing, or the config does not belong to these weights.",
        )
    kept = {name: weights for name, weights in tensors.items() if not name.endswith(_IGNORED_SUFFIXES)}
    kept = dict(without_other_parts(kept, hparams))
    for step in (*family.passes, stack_experts):
        kept = dict(step(kept, hparams))
    gguf_name = gguf_names(family, hparams)
    plans: dict[str, TensorPlan] = {}
    for hf_name, weights in {**rope_tensors(hparams), **kept}.items():
        name = gguf_name(hf_name, weights)
        if not weights.shape or 0 in weights.shape:
            raise _without_place(weights, family, n_blocks)
        if name in plans:
            raise TensorError(f"tensor {printable(weights.name)!r} is there twice, as {name}", tensor=weights.name)
        check_readable(weights)
        keep_f32 = len(weights.shape) < 2 or not name.endswith(".weight") or bool(_KEPT_F32.fullmatch(name))
        plans[name] = TensorPlan(name, weights, keep_f32)
    _check_ends(plans, hparams)
    _check_biases(plans)
    return list(plans.values())


def gguf_names(family: ModelFamily, hparams: Hparams) -> Callable[[str, Weights], str]:
    """From a name of the checkpoint, after the family's passes, to GGUF's.

    The function raises TensorError for a tensor that has no place in the architecture.
    """
    n_blocks = family.n_blocks(hparams)
    names = gguf.get_tensor_name_map(_architecture(family), n_blocks)

    def gguf_name(name: str, weights: Weights) -> str:
        found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None and _GGUF_NAME.fullmatch(name):
            return name  # llama.cpp may know more tensors of an architecture than the installed gguf
        if found is None:
            raise _without_place(weights, family, n_blocks)
        return found

    return gguf_name


def _without_place(weights: Weights, family: ModelFamily, n_blocks: int) -> TensorError:
    return TensorError(
        f"tensor {printable(weights.name)!r} in {weights.file} has no place in a {family.gguf_arch} model "
        f"of {n_blocks} blocks",
        hint="The config does not belong to these weights, or they are of a variant of this architecture.",
        tensor=weights.name,
    )


def _architecture(family: ModelFamily) -> Any:
    for arch, name in gguf.MODEL_ARCH_NAMES.items():
        if name == family.gguf_arch:
            return arch
    raise too_old("gguf", family.gguf_arch)


def _check_ends(plans: Mapping[str, TensorPlan], hparams: Hparams) -> None:
    """The embedding has a row a token, and there is an output matrix unless the embedding serves as one.

    llama.cpp would take the embedding silently, and answer nonsense.
    """
    embedding = plans.get("token_embd.weight")
    n_vocab = hparams.integer("vocab_size")
    if embedding is None:
        raise TensorError("the checkpoint has no token embedding", hint="Is a shard missing?")
    if embedding.shape[0] != n_vocab:
        name = embedding.weights.name
        raise TensorError(
            f"tensor {printable(name)!r} has {embedding.shape[0]:,} rows, vocab_size is {n_vocab:,}",
            hint="The config does not belong to these weights.",
            tensor=name,
        )
    if "output.weight" not in plans and not hparams.ties_embeddings:
        raise TensorError(
            "tensor 'lm_head.weight' is missing, and config.json does not tie it to the embedding",
            hint='A shard is missing, or config.json lacks "tie_word_embeddings": true.',
            tensor="lm_head.weight",
        )


def _check_biases(plans: Mapping[str, TensorPlan]) -> None:
    """A bias that one block has, every block with that matrix has: llama.cpp would do without it silently."""
    biased = {name.split(".")[2] for name in plans if name.startswith("blk.") and name.endswith(".bias")}
    for name in plans:
        if name.startswith("blk.") and name.endswith(".weight") and name.split(".")[2] in biased:
            bias = name.removesuffix("weight") + "bias"
            if bias not in plans:
                raise TensorError(
                    f"the checkpoint lacks a tensor of the model: {bias}, which other blocks have",
                    hint="A shard is missing or belongs to another checkpoint.",
                    tensor=bias,
                )

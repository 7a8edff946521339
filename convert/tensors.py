"""Which tensors the file gets, and from where: a plan that can be listed before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import Checkpoint, TensorInfo
from models.errors import TensorError
from models.families import ModelFamily
from models.hparams import Hparams
from models.text import printable

# Buffers that some checkpoints carry along; they follow from the config.
_IGNORED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file before its type is known.

    name            GGUF name
    shape           outermost first, as in the checkpoint
    source          where its weights lie; None for a tensor that is computed, whose `values` these are
    heads           > 0: the rows of each of so many heads change places (see `interleave_halves`)
    keep_f32        stays F32 whatever the file type (norms, biases)
    """

    name: str
    shape: tuple[int, ...]
    source: TensorInfo | None
    values: NDArray[np.float32] | None = None
    heads: int = 0
    keep_f32: bool = False

    @property
    def row_length(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.n_weights // self.row_length

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def rows_together(self) -> int:
        """Rows that can only be read as one: those of a head where heads are reordered, else single rows."""
        if self.heads:
            return max(1, self.n_rows // self.heads)
        return 1


def plan_tensors(checkpoint: Checkpoint, family: ModelFamily, hparams: Hparams) -> list[TensorPlan]:
    """The tensors of the file. Raises TensorError for one that nobody asked for, that is missing or misshapen."""
    n_tensors = len(checkpoint.tensors)
    if hparams.n_layers > n_tensors:  # gguf lists the names of all blocks: not of 2^30
        raise TensorError(
            f"config.json asks for {hparams.n_layers:,} blocks, the checkpoint has {n_tensors:,} tensors",
            hint="A shard is missing, or the config does not belong to these weights.",
        )
    names = gguf.get_tensor_name_map(_architecture(family), hparams.n_layers)
    plans = {plan.name: plan for plan in _computed_tensors(hparams)}
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(_IGNORED_SUFFIXES):
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None or not tensor.shape:
            raise TensorError(
                f"tensor {printable(tensor.name)!r} in {tensor.path.name} has no place in a {family.gguf_arch} model "
                f"of {hparams.n_layers} blocks",
                hint="The config does not belong to these weights, or they are of a variant of this architecture.",
                tensor=tensor.name,
            )
        if name in plans:
            raise TensorError(f"tensor {printable(tensor.name)!r} is there twice, as {name}", tensor=tensor.name)
        keep_f32 = len(tensor.shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight")
        plans[name] = TensorPlan(
            name, tensor.shape, tensor, heads=_reordered_heads(name, tensor, family, hparams), keep_f32=keep_f32
        )
    _check_ends(plans, hparams)
    _check_biases(plans)
    return list(plans.values())


def _architecture(family: ModelFamily) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_arch)


def _reordered_heads(name: str, tensor: TensorInfo, family: ModelFamily, hparams: Hparams) -> int:
    if not family.interleaved_rope:
        return 0
    part = name.split(".")[-2]
    heads = {"attn_q": hparams.n_heads, "attn_k": hparams.n_heads_kv}.get(part, 0)
    if heads and tensor.shape[0] % (2 * heads):
        raise TensorError(
            f"tensor {printable(tensor.name)!r} has {tensor.shape[0]} rows, which {heads} heads do not divide",
            tensor=tensor.name,
        )
    return heads


def _check_ends(plans: Mapping[str, TensorPlan], hparams: Hparams) -> None:
    """The embedding has a row a token, and there is an output matrix unless the embedding serves as one.

    llama.cpp would take the embedding silently, and answer nonsense.
    """
    embedding = plans.get("token_embd.weight")
    n_vocab = hparams.integer("vocab_size")
    if embedding is None or embedding.source is None:
        raise TensorError("the checkpoint has no token embedding", hint="Is a shard missing?")
    if embedding.shape[0] != n_vocab:
        raise TensorError(
            f"tensor {printable(embedding.source.name)!r} has {embedding.shape[0]:,} rows, vocab_size is {n_vocab:,}",
            hint="The config does not belong to these weights.",
            tensor=embedding.source.name,
        )
    if "output.weight" not in plans and not hparams.flag("tie_word_embeddings"):
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


def _computed_tensors(hparams: Hparams) -> Iterator[TensorPlan]:
    if hparams.rope.type == "llama3":
        values = _llama3_rope_factors(hparams)
        yield TensorPlan("rope_freqs.weight", values.shape, None, values=values, keep_f32=True)


def _llama3_rope_factors(hparams: Hparams) -> NDArray[np.float32]:
    """What each rotary frequency is divided by, [head_dim / 2].

    Source: transformers, modeling_rope_utils.py `_compute_llama3_parameters`; llama.cpp wants factors instead of
    frequencies. In float32 step by step, as llama.cpp's converter computes them, but for the power, which is rounded
    from float64: torch's own may be off by a last bit, which no Llama 3 config shows.
    """
    rope = hparams.rope
    dim = hparams.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    with np.errstate(all="ignore"):  # of an absurd theta; see below
        frequencies = np.float32(1.0) / np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    trained_context = rope.number("original_max_position_embeddings", 8192)
    if factor <= 0 or low <= 0 or high <= low or trained_context <= 0 or not np.isfinite(frequencies).all():
        raise TensorError(
            "config.json: the llama3 rope factors are not positive and rising",
            hint="See rope_parameters, or rope_scaling and rope_theta.",
        )
    factors = []
    for frequency in frequencies:
        wavelength = np.float32(2 * math.pi) / frequency
        if wavelength < trained_context / high:
            factors.append(1.0)
        elif wavelength > trained_context / low:
            factors.append(factor)
        else:
            smooth = (np.float32(trained_context) / wavelength - np.float32(low)) / np.float32(high - low)
            factors.append(float(np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)))
    return np.array(factors, dtype=np.float32)


def interleave_halves(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows of whole heads, from transformers' rotary order (two halves) to llama.cpp's (neighbouring pairs).

    `rows` is [n_heads * head_dim, ...]; row i of the first half comes before row i of the second.
    """
    head_dim = rows.shape[0] // n_heads
    halves = rows.reshape(n_heads, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

"""The tensors that follow from a rope scaling: what each rotary frequency is divided by."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.errors import TensorError
from models.hparams import Hparams
from models.weights import Weights, constant


def rope_tensors(hparams: Hparams) -> Mapping[str, Weights]:
    """GGUF name -> factors [rotary_dim / 2]. Raises TensorError for parameters that make no sense."""
    if hparams.rope.type == "llama3":
        return {"rope_freqs.weight": constant("rope_freqs.weight", _llama3_factors(hparams))}
    if hparams.rope.type == "longrope":
        names = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
        return {name: constant(name, _longrope_factors(hparams, field)) for field, name in names.items()}
    return {}


def _rotary_dim(hparams: Hparams) -> int:
    return int(hparams.head_dim * hparams.rope.partial)


def _longrope_factors(hparams: Hparams, field: str) -> NDArray[np.float32]:
    factors = hparams.rope.fields.get(field)
    n = _rotary_dim(hparams) // 2
    if not isinstance(factors, list) or len(factors) != n or not all(_is_factor(factor) for factor in factors):
        raise TensorError(
            f"config.json: the rope parameter {field!r} is not a list of {n} positive numbers",
            hint="See rope_parameters, or rope_scaling.",
        )
    return np.array(factors, np.float32)


def _is_factor(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def _llama3_factors(hparams: Hparams) -> NDArray[np.float32]:
    """Source: transformers, modeling_rope_utils.py `_compute_llama3_parameters`; llama.cpp wants factors instead of
    frequencies. In float32 step by step, as llama.cpp's converter computes them, but for the power, which is rounded
    from float64: torch's own may be off by a last bit, which no Llama 3 config shows.
    """
    rope = hparams.rope
    dim = _rotary_dim(hparams)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    with np.errstate(all="ignore"):  # of an absurd theta; see below
        frequencies = np.float32(1.0) / np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    trained_context = rope.number("original_max_position_embeddings", 8192)
    if factor <= 0 or low <= 0 or high < low or trained_context <= 0 or not np.isfinite(frequencies).all():
        raise TensorError(
            "config.json: the llama3 rope factors are not positive and rising",
            hint="See rope_parameters, or rope_scaling and rope_theta.",
        )
    factors = []
    for frequency in frequencies:
        wavelength = np.float32(2 * math.pi) / frequency
        if wavelength < trained_context / high:
            factors.append(1.0)
        elif wavelength > trained_context / low or high == low:
            factors.append(factor)
        else:
            smooth = (np.float32(trained_context) / wavelength - np.float32(low)) / np.float32(high - low)
            factors.append(float(np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)))
    return np.array(factors, dtype=np.float32)

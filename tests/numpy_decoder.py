"""A decoder in numpy, as a reference for families that transformers lacks. Everything in float64, whole sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Block = Mapping[str, NDArray[Any]]
"""`norm`, `q`, `k`, `v`, `o`, `ffn_norm`, `gate`, `up`, `down`; each with `_bias` behind it where there is one.

Matrices are [n_out, n_in]. With experts, `router` [n, n_in], and gate, up and down are [n, n_out, n_in];
`shared_gate`, `shared_up`, `shared_down` are for all.
"""


@dataclass(frozen=True)
class Decoder:
    """How a family differs from Llama. Sizes in elements of a head."""

    n_heads: int
    n_heads_kv: int
    rope: Literal["halves", "pairs", "none"] = "halves"
    rotary_dim: int | None = None
    theta: float = 10000.0
    alibi: bool = False
    layer_norm: bool = False
    eps: float = 1e-6
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    experts_used: int = 0


def logits(
    decoder: Decoder, ids: Sequence[int], embedding: NDArray[Any], blocks: Sequence[Block], end: Block
) -> NDArray[np.float32]:
    """[n_ids, n_vocab]. `end` has `norm` and `output`."""
    x = embedding[list(ids)].astype(np.float64) * decoder.embedding_scale
    for block in blocks:
        x = x + decoder.residual_scale * _attention(decoder, block, _norm(decoder, block, "norm", x))
        x = x + decoder.residual_scale * _ffn(decoder, block, _norm(decoder, block, "ffn_norm", x))
    return np.asarray(_norm(decoder, end, "norm", x) / decoder.logit_divisor @ end["output"].T, np.float32)


def _norm(decoder: Decoder, block: Block, name: str, x: Array) -> Array:
    if decoder.layer_norm:
        x = x - x.mean(-1, keepdims=True)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + decoder.eps)
    return np.asarray(normed * block[name] + block.get(f"{name}_bias", 0.0))


def _linear(block: Block, name: str, x: Array) -> Array:
    return np.asarray(x @ block[name].T + block.get(f"{name}_bias", 0.0))


def _attention(decoder: Decoder, block: Block, x: Array) -> Array:
    n = len(x)
    q = _linear(block, "q", x).reshape(n, decoder.n_heads, -1)
    k = _linear(block, "k", x).reshape(n, decoder.n_heads_kv, -1)
    v = _linear(block, "v", x).reshape(n, decoder.n_heads_kv, -1)
    q, k = _rotated(decoder, q), _rotated(decoder, k)
    per_key = decoder.n_heads // decoder.n_heads_kv
    k, v = np.repeat(k, per_key, axis=1), np.repeat(v, per_key, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    if decoder.alibi:
        slopes = 2.0 ** (-8.0 / decoder.n_heads * np.arange(1, decoder.n_heads + 1))
        scores = scores - slopes[:, None, None] * distance
    scores = np.where(distance < 0, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return _linear(block, "o", np.einsum("hij,jhd->ihd", weights, v).reshape(n, -1))


def _rotated(decoder: Decoder, heads: Array) -> Array:
    """[n, heads, head_dim]: two halves against each other, or neighbours."""
    if decoder.rope == "none":
        return heads
    dim = decoder.rotary_dim or heads.shape[-1]
    frequencies = decoder.theta ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(len(heads))[:, None, None] * frequencies
    turning, still = heads[..., :dim], heads[..., dim:]
    if decoder.rope == "pairs":
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = turning[..., : dim // 2], turning[..., dim // 2 :]
    turned = (
        first * np.cos(angles) - second * np.sin(angles),
        second * np.cos(angles) + first * np.sin(angles),
    )
    joined = np.stack(turned, -1).reshape(turning.shape) if decoder.rope == "pairs" else np.concatenate(turned, -1)
    return np.concatenate([joined, still], -1)


def _ffn(decoder: Decoder, block: Block, x: Array) -> Array:
    if "router" not in block:
        gate = _linear(block, "gate", x)
        return _linear(block, "down", gate / (1 + np.exp(-gate)) * _linear(block, "up", x))
    shares = np.exp(x @ block["router"].T)
    shares /= shares.sum(-1, keepdims=True)
    result = np.zeros_like(x)
    for i, share in enumerate(shares):
        for expert in np.argsort(-share)[: decoder.experts_used]:
            one = {name: block[name][expert] for name in ("gate", "up", "down")}
            result[i] += share[expert] * _ffn(decoder, one, x[i])
    if "shared_up" in block:
        result += _ffn(decoder, {name: block[f"shared_{name}"] for name in ("gate", "up", "down")}, x)
    return result

"""Quantized checkpoints, decoded to the values that they stand for.

Each method is a module with one function: the stored tensors by name, and `quantization_config`, to `Weights` by the
names that the unquantized checkpoint has. Rows are decoded when they are read, from their own blocks and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from convert.quantized import awq, bitsandbytes, compressed, fp8, gptq, mxfp4
from convert.quantized.parts import Infos
from convert.stored import stored
from models.errors import UnsupportedError
from models.families import Tensors
from models.text import printable
from models.weights import Weights

_METHODS: Mapping[str, Callable[[Infos, Mapping[str, Any]], dict[str, Weights]]] = {
    "awq": awq.decode,
    "bitsandbytes": bitsandbytes.decode,
    "compressed-tensors": compressed.decode,
    "fbgemm_fp8": fp8.decode,
    "fp8": fp8.decode,
    "gptq": gptq.decode,
    "modelopt": fp8.decode,
    "mxfp4": mxfp4.decode,
}


def decoded(infos: Infos, config: Mapping[str, Any]) -> Tensors:
    """The tensors of a checkpoint by name, quantized or not.

    Raises UnsupportedError for a method that is not decoded, by name, TensorError for parts that do not fit.
    """
    settings = _settings(config)
    if not settings:
        return {name: stored(info) for name, info in infos.items()}
    method = str(settings.get("quant_method", "?"))
    if method not in _METHODS:
        raise UnsupportedError(
            f"the checkpoint is quantized by {printable(method, 40)!r}, which is not decoded",
            hint=f"Decoded are {', '.join(_METHODS)}. Else convert the original bf16, f16 or f32 checkpoint.",
            quant_method=method,
        )
    return _METHODS[method](infos, settings)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config`, of the whole model or of its text part."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "compression_config"):
            settings = place.get(name)
            if settings:
                return settings if isinstance(settings, Mapping) else {"quant_method": settings}
    return None

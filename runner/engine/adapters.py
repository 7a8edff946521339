"""LoRA adapters on a loaded model."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import native
from models.errors import LoadError, UsageError


def apply_adapters(model: Any, context: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Add the product of each adapter's matrices, times its scale, to the weights; freed with the model.

    Raises LoadError for a file that is no adapter of this model, UsageError for a scale that is no number.
    """
    if not loras:
        return
    lib = native.library()
    loaded = []
    for path, scale in loras:
        if not math.isfinite(scale):
            raise UsageError(f"--lora {path.name}: the scale {scale} is no number")
        if not path.is_file():
            raise LoadError(
                f"no such adapter: {path}", hint="`handmill convert` makes one of a PEFT folder", path=path
            )
        with native.capture_log() as log:
            adapter = lib.llama_adapter_lora_init(model, os.fsencode(path))
        if not adapter:
            said = "; ".join(log.problems())
            raise LoadError(f"{path.name} is no LoRA adapter of this model: {said}", path=path)
        loaded.append(adapter)
    pointers = (lib.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
    scales = (ctypes.c_float * len(loaded))(*(scale for _, scale in loras))
    if lib.llama_set_adapters_lora(context, pointers, len(loaded), scales) != 0:
        raise LoadError("llama.cpp cannot apply the adapters", hint="one alone may work")

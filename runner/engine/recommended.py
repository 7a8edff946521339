"""What the numbers of `Sampling` may be, and what a model's own file recommends for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.errors import UsageError
from runner.engine.protocol import SAMPLERS, Sampling

MAX_LOOK_BACK = 1 << 20
MAX_LOGPROBS = 20

LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 30),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, 10),
    "max_tokens": (1, 2**31 - 1),
    "seed": (0, 2**32 - 2),  # one more is llama.cpp's word for a random one
    "penalty_last_n": (0, MAX_LOOK_BACK),
    "frequency_penalty": (-10, 10),
    "presence_penalty": (-10, 10),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (0, MAX_LOOK_BACK),
    "dry_last_n": (0, MAX_LOOK_BACK),
    "top_n_sigma": (0, 1000),
    "typical_p": (0, 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dynatemp_range": (0, 100),
    "dynatemp_exponent": (0, 100),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
    "logprobs": (0, MAX_LOGPROBS),
}
"""The lowest and the highest value of each number."""

MAX_BIAS = 100.0
INTEGERS = frozenset(
    {
        "top_k",
        "max_tokens",
        "seed",
        "penalty_last_n",
        "dry_allowed_length",
        "dry_last_n",
        "mirostat",
        "logprobs",
    }
)

_FILE_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "penalty_last_n",
    "penalty_repeat": "repeat_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
"""Of `general.sampling.*`, as llama-arch.cpp lists them; `sequence` comes on top."""
_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}


def check_sampling(sampling: Sampling) -> None:
    """Raise UsageError, which names the field, where a value is none that a sampler can work with."""
    for name, (low, high) in LIMITS.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # false for NaN as well
            raise UsageError(f"{name} is {value}, and must be from {low:g} to {high:g}", option=name)
    for token, bias in sampling.logit_bias:
        if not abs(bias) <= MAX_BIAS:
            raise UsageError(
                f"logit_bias of token {token} is {bias}, and must be from {-MAX_BIAS:g} to {MAX_BIAS:g}",
                option="logit_bias",
            )
    for name in sampling.samplers:
        if name not in SAMPLERS:
            raise UsageError(
                f"there is no sampler {name!r}", hint=f"There are {', '.join(SAMPLERS)}", option="samplers"
            )
    if any(not text for text in sampling.stop):
        raise UsageError("an empty stop text would end every reply before it begins", option="stop")


def recommended_sampling(metadata: Mapping[str, str]) -> Sampling:
    """What the model's own `general.sampling.*` keys ask for; what they leave out or garble stays default."""
    found: dict[str, Any] = {}
    for key, name in _FILE_KEYS.items():
        try:
            value = float(metadata[f"general.sampling.{key}"])
        except (KeyError, ValueError):
            continue
        low, high = LIMITS[name]
        if math.isfinite(value) and low <= value <= high:
            # f32 in the file: 0.7 reads as 0.699999988
            found[name] = int(value) if name in INTEGERS else round(value, 6)
    if order := sampler_names(metadata.get("general.sampling.sequence", "").split(";")):
        found["samplers"] = order
    return replace(Sampling(), **found)


def sampler_names(names: list[str]) -> tuple[str, ...]:
    """The samplers meant by names as llama.cpp takes them (`top-k`, `topk`, `nucleus`); unknown ones left out."""
    known = {name.replace("_", ""): name for name in SAMPLERS} | _ALIASES
    plain = (name.strip().lower().replace("-", "").replace("_", "") for name in names)
    return tuple(known[name] for name in plain if name in known)

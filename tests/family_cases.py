"""All cases, and where llama.cpp's converter and this one part."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType

from tests import (
    family_cases_dense,
    family_cases_experts,
    family_cases_gemma,
    family_cases_multimodal,
    family_cases_older,
    family_cases_recurrent,
)
from tests.family_checkpoints import Case

__all__ = ["CASES", "DIFFERENCES", "PEER_STOPS"]

_MODULES = (
    family_cases_dense,
    family_cases_experts,
    family_cases_gemma,
    family_cases_recurrent,
    family_cases_older,
    family_cases_multimodal,
)

CASES: Mapping[str, Case] = MappingProxyType(dict(chain.from_iterable(module.CASES.items() for module in _MODULES)))
if len(CASES) != sum(len(module.CASES) for module in _MODULES):
    raise ValueError("two cases have one name")

DIFFERENCES: Mapping[str, Mapping[str, str]] = MappingProxyType({})
"""Case -> key or tensor that differs from llama.cpp's converter -> why."""

PEER_STOPS: Mapping[str, str] = MappingProxyType({})
"""Case -> what llama.cpp's converter says when it stops on it."""

"""What `runner.engine.supervised` has called in the engine's process: the one engine there, and its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.isolated import send
from runner.engine.local import LocalEngine
from runner.engine.protocol import GenerationChunk, LoadOptions, Message, ModelInfo, Sampling

if TYPE_CHECKING:
    from runner.bench import Speed

_engines: list[LocalEngine] = []


@dataclass(frozen=True)
class Facts:
    """What of an engine does not change."""

    info: ModelInfo
    has_chat_template: bool
    default_sampling: Sampling
    workers: tuple[str, ...]
    """Those that hold layers."""


def load(path: Path, options: LoadOptions) -> Facts:
    """As `runner.engine.local.load`; how far it has come is sent."""
    from runner.engine import local

    engine = local.load(path, options, send)
    _engines.append(engine)
    info = engine.info
    # llama.cpp describes a device of another machine by its address
    used = tuple(endpoint for endpoint in options.workers if f"({endpoint})" in info.device)
    return Facts(info, engine.has_chat_template, engine.default_sampling, used)


def encode_text(text: str) -> list[int]:
    return _engine().encode_text(text)


def encode_chat(messages: Sequence[Message], think: bool | None) -> list[int]:
    return _engine().encode_chat(messages, think=think)


def chat(
    messages: Sequence[Message], sampling: Sampling | None, shift: bool, given: Sequence[int]
) -> Iterator[GenerationChunk]:
    return _engine().chat(messages, sampling, shift=shift, given=given)


def generate(tokens: Sequence[int], sampling: Sampling | None, given: Sequence[int]) -> Iterator[GenerationChunk]:
    return _engine().generate(tokens, sampling, given=given)


def speeds(prompt: int, generate: int, depths: Sequence[int], rounds: int) -> Iterator[Speed]:
    return _engine().speeds(prompt=prompt, generate=generate, depths=depths, rounds=rounds)


def cancel() -> None:
    for engine in _engines:
        engine.cancel()


def close() -> None:
    for engine in _engines:
        engine.close()


def _engine() -> LocalEngine:
    return _engines[0]

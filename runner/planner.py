"""Planning in a process of its own, where llama.cpp is asked: a device that is away ends that one, not this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from models.errors import LoadError
from models.gguf_file import GgufFile
from models.isolated import Ended, Isolated, isolation
from runner import devices, placing, rpc
from runner.bandwidth import DeviceSpeed, device_speed
from runner.devices import Device
from runner.engine.accounting import account
from runner.engine.context_params import ContextOptions
from runner.placement import KV_TYPES, Buffers, Placement, Settings, Split
from runner.placing import Wish

QUESTION_SECONDS = 30
"""A look at a large model over a slow link takes a few; a server that was stopped never answers."""

Result = TypeVar("Result")


class Planner:
    """Answers about devices and placements. Not to be used by two threads at once."""

    def __init__(self, apart: Isolated) -> None:
        self._apart = apart
        self._speeds: dict[tuple[str, str, int], DeviceSpeed | None] = {}

    def devices(self) -> list[Device]:
        """As `runner.devices.devices`. Raises LoadError."""
        return self._asked(devices.devices)

    def speed(self, device: str, tensor_type: str, threads: int) -> DeviceSpeed | None:
        """As `runner.bandwidth.device_speed`, measured once; None where it cannot be. Raises LoadError for a loss."""
        key = device, tensor_type, threads
        if key not in self._speeds:
            try:
                self._speeds[key] = self._asked(device_speed, *key)
            except LoadError as error:
                if error.facts.get("lost"):
                    raise
                self._speeds[key] = None
        return self._speeds[key]

    def in_order(self, gguf: GgufFile, available: Sequence[Device], threads: int) -> list[Device]:
        """As `runner.placing.nearest_first`, by measured speeds. Raises LoadError."""
        return placing.nearest_first(gguf, available, lambda name: self.speed(name, gguf.main_type, threads))

    def account(
        self, path: Path, split: Split, settings: Settings, *, whole_window: bool = False, repack: bool = True
    ) -> Mapping[str, Buffers]:
        """Bytes on each device. Raises LoadError."""
        k, v = (KV_TYPES[kind][0] for kind in settings.kv_types)
        options = ContextOptions(settings.n_ctx, 1, 1, settings.batch, type_k=k, type_v=v, whole_window=whole_window)
        return self._asked(account, path, split, options, repack)

    def place(self, gguf: GgufFile, available: Sequence[Device], wish: Wish, *, repack: bool = True) -> Placement:
        """Where the layers go, and the bytes there. Raises LoadError."""
        return placing.place(
            gguf, available, wish, lambda split, settings: self.account(gguf.path, split, settings, repack=repack)
        )

    def _asked(self, function: Callable[..., Result], *args: object) -> Result:
        try:
            return self._apart.call(function, *args, seconds=QUESTION_SECONDS)
        except Ended as end:
            raise LoadError(
                f"planning failed: {end}",
                hint="A device may be lost, or the file damaged; `--gpu-layers 0` does without devices.",
                lost=True,
            ) from None


@contextmanager
def planner(endpoints: Sequence[str] | None = None) -> Iterator[Planner]:
    """Start the process, with the RPC servers that this one knows, or those given.

    Raises LoadError; with `lost` among its facts where a device is away.
    """
    with isolation("runner.engine.accounting", "runner.bandwidth") as apart:
        asked = Planner(apart)
        try:
            for endpoint in rpc.endpoints() if endpoints is None else endpoints:
                asked._asked(rpc.add_server, endpoint)
        except LoadError as error:
            raise LoadError(str(error), hint=error.hint, lost=True) from error
        yield asked

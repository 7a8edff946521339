"""handmill as a library.

    from runner import Message, load

    with load("starter") as model:
        for chunk in model.chat([Message("user", "Name three rivers.")]):
            print(chunk.text, end="", flush=True)

`load` takes what MODEL stands for on the command line, and `LoadOptions`; `chat` and `generate` take `Sampling`, and
stream `GenerationChunk`s with text, token ids and timings. What goes wrong is a `models.errors.HandmillError`.
Importing this loads nothing heavy; `load` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.engine.protocol import GenerationChunk, GenerationStats, LoadOptions, LoadProgress, Message, Sampling

if TYPE_CHECKING:
    from runner.engine.protocol import LoadedEngine

__all__ = ["GenerationChunk", "GenerationStats", "LoadOptions", "Message", "Sampling", "load"]


def load(
    model: str | Path, options: LoadOptions | None = None, *, progress: LoadProgress | None = None
) -> LoadedEngine:
    """A model, ready to talk: a GGUF file, a library name, owner/name[:TYPE] on the hub, a checkpoint directory.

    One of the hub is fetched, and a checkpoint converted, the first time. Close it, or use it in a `with` block.
    Raises HandmillError: ModelFileError, LoadError, HubError, UsageError and others.
    """
    from runner.cli.resolve import resolve_model
    from runner.engine import start

    return start.load(resolve_model(str(model), quiet=True), options, progress)

"""Loading a model: in this process where only its CPU computes, else in one of its own."""

from __future__ import annotations

from pathlib import Path

from runner.devices import gpu_backend_files
from runner.engine.protocol import LoadedEngine, LoadOptions, LoadProgress


def load(path: Path, options: LoadOptions | None = None, progress: LoadProgress | None = None) -> LoadedEngine:
    """Load a GGUF file, with what tuning has found for what `options` leave open.

    Raises ModelFileError, LoadError, UsageError.
    """
    from runner.tuning import with_tuned

    options = options or LoadOptions()
    return load_as_told(path, with_tuned(path, options) if path.is_file() else options, progress)


def load_as_told(path: Path, options: LoadOptions, progress: LoadProgress | None = None) -> LoadedEngine:
    """Load a GGUF file with these options. Raises ModelFileError, LoadError, UsageError."""
    if options.gpu_layers != 0 and (options.workers or gpu_backend_files()):
        from runner.engine.supervised import SupervisedEngine

        return SupervisedEngine(path, options, progress)
    from runner.engine import local

    return local.load(path, options, progress)

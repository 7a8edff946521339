"""Loading a model: in this process where only its CPU computes, else in one of its own."""

from __future__ import annotations

import re
from pathlib import Path

from models import native
from runner.engine.protocol import LoadedEngine, LoadOptions, LoadProgress

_BACKEND = re.compile(r"(?:lib)?ggml-(\w+)\.(?:so|dylib|dll)")
_HARMLESS = ("base", "cpu", "blas", "rpc")
"""Backends that end no process: those of the CPU, and of workers where there are none."""


def load(path: Path, options: LoadOptions | None = None, progress: LoadProgress | None = None) -> LoadedEngine:
    """Load a GGUF file, with what tuning has found for what `options` leave open.

    Raises ModelFileError, LoadError, UsageError.
    """
    from runner.tuning import with_tuned

    options = options or LoadOptions()
    return load_as_told(path, with_tuned(path, options) if path.is_file() else options, progress)


def load_as_told(path: Path, options: LoadOptions, progress: LoadProgress | None = None) -> LoadedEngine:
    """Load a GGUF file with these options. Raises ModelFileError, LoadError, UsageError."""
    if options.gpu_layers != 0 and (options.workers or has_gpu_backend()):
        from runner.engine.supervised import SupervisedEngine

        return SupervisedEngine(path, options, progress)
    from runner.engine import local

    return local.load(path, options, progress)


def has_gpu_backend() -> bool:
    """Whether this build of llama.cpp can use a GPU, by the names of its files: nothing is loaded for it."""
    files = [file.name for folder in native.library_folders() for file in folder.glob("*ggml-*")]
    names = [match[1] for name in files if (match := _BACKEND.match(name))]
    return any(not name.startswith(_HARMLESS) for name in names)

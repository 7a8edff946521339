"""Every error that handmill raises on purpose.

    HandmillError                 a named error: message, hint, facts
    ├── UsageError                the command line asks for what cannot be (exit code 2)
    ├── CheckpointError           a Hugging Face checkpoint cannot be read
    │   ├── UnsupportedError      it can be read, but this version cannot convert it
    │   ├── TensorError           one of its tensors is missing, broken or not what the config says
    │   └── TokenizerError        its tokenizer is missing or broken
    ├── ModelFileError            a GGUF file cannot be read
    ├── ConversionFailed          llama.cpp refused a model, or a value does not fit a type
    ├── OutputError               a file cannot be written
    ├── CheckFailed               a converted file does not pass its own check
    ├── LoadError                 llama.cpp cannot load a model
    ├── GenerationError           llama.cpp failed while it computed
    │   └── ContextOverflow       a prompt is longer than the context
    ├── TemplateError             a chat template raises, loops or is missing
    ├── LibraryError              no such model in the library
    └── HubError                  the hub cannot be reached, or has no such thing

An error carries its facts as attributes, for a program, and a hint that tells a person what to do next. Only
`runner.cli.main` turns one into a message and an exit code.
"""

from __future__ import annotations

from typing import ClassVar


class HandmillError(Exception):
    """A failure that has a name. `str(error)` is one sentence; `hint` says what to do next.

    Facts given by keyword (`path=...`, `tensor=...`) become attributes and the dictionary `facts`.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message)
        self.hint = hint
        self.facts = facts

    def __getattr__(self, name: str) -> object:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)


class UsageError(HandmillError):
    """The command line asks for what cannot be."""

    exit_code = 2


class CheckpointError(HandmillError):
    """A Hugging Face checkpoint cannot be read."""


class UnsupportedError(CheckpointError):
    """The checkpoint can be read, but this version does not know how to convert it."""


class TensorError(CheckpointError):
    """A tensor is missing, broken, or not what the config says."""


class TokenizerError(CheckpointError):
    """The tokenizer is missing or broken."""


class ModelFileError(HandmillError):
    """A GGUF file cannot be read."""


class ConversionFailed(HandmillError):
    """llama.cpp refused a model, or a value does not fit a type."""


class OutputError(HandmillError):
    """A file cannot be written."""


class CheckFailed(HandmillError):
    """A converted file does not pass its own check."""


class LoadError(HandmillError):
    """llama.cpp cannot load a model; the last lines of its log are in the message."""


class GenerationError(HandmillError):
    """llama.cpp failed while it computed."""


class ContextOverflow(GenerationError):
    """A prompt is longer than the context."""


class TemplateError(HandmillError):
    """A chat template is missing, raises, or does not end."""


class LibraryError(HandmillError):
    """The library has no such model."""


class HubError(HandmillError):
    """The hub cannot be reached, or has no such thing."""

"""Which release of gguf and of llama-cpp-python knows an architecture: that which this project asks for knows all."""

from __future__ import annotations

import re
from importlib.metadata import requires, version

from models.errors import UnsupportedError
from models.families import registry


def too_old(package: str, architecture: str) -> UnsupportedError:
    """The error where the installed release of `package` does not know the architecture of one of the families."""
    wanted = asked_for(package)
    return UnsupportedError(
        f"{package} {version(package)} is installed, which does not know the architecture {architecture!r};"
        f" {package} {wanted} has it",
        hint=f"pip install '{package}=={wanted}'",
        architecture=architecture,
    )


def asked_for(package: str) -> str:
    """The release of `package` that handmill is made for."""
    pins = (re.fullmatch(rf"{re.escape(package)}==(\S+)", line) for line in requires("handmill") or ())
    return next(pin[1] for pin in pins if pin)


def known_architectures() -> frozenset[str]:
    """llama.cpp's names of all that the families have."""
    return frozenset(family.gguf_arch for family in registry().values())

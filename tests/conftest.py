"""What all tests share: a real small model, and a library folder of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Only tests for a GPU see one: the others say what a CPU says. And Ctrl-C is heard in the background, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr != "gpu":
        for name in ("CUDA", "HIP", "GGML_VK"):
            os.environ[f"{name}_VISIBLE_DEVICES"] = "" if name == "GGML_VK" else "-1"


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.markexpr == "gpu":
        from runner import devices

        if not devices.has_offload_device():
            pytest.exit(devices.why_no_gpu(), returncode=1)


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The GGUF of the starter model, fetched once where it is not there; `HANDMILL_STARTER` names another."""
    given = os.environ.get("HANDMILL_STARTER")
    if given:
        return Path(given)
    from models.starter import fetch_starter

    # A session's fixture is set up before `own_home`, so this is the person's own library.
    return fetch_starter()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or touches the library of the person who runs it."""
    home = tmp_path / "handmill-home"
    monkeypatch.setenv("HANDMILL_HOME", str(home))
    return home

"""llama.cpp's own converter and quantizer, as oracles for the parity tests and the benchmarks.

`make test-parity` builds them into `build/peer`; HANDMILL_PEER names another folder of the same shape. The converter
needs a Python with torch and transformers: this one if it has them, else HANDMILL_PEER_PYTHON, else .venv-parity.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from scripts.build_peer import CONVERTER, QUANTIZER, peer_folder
from scripts.environment import ROOT

__all__ = ["converter_command", "missing_peer", "need_peer", "peer_convert", "peer_lora", "peer_quantize"]
__all__ += ["quantizer_command"]


def missing_peer() -> str:
    """What the comparison lacks on this machine; nothing when all is there."""
    for part in (CONVERTER, QUANTIZER):
        if not (peer_folder() / part).exists():
            return f"{peer_folder() / part} is not built (make test-parity)"
    if _python() is None:
        return "there is no Python with torch and transformers (make test-parity)"
    return ""


def need_peer() -> None:
    """Skip the test on a machine without the oracles; fail it under `make test-parity`, which brought them."""
    if missing := missing_peer():
        if os.environ.get("HANDMILL_NEED_PEER"):
            pytest.fail(missing)
        pytest.skip(missing)


def peer_convert(checkpoint: Path, output: Path, outtype: str = "auto", options: Sequence[str] = ()) -> None:
    """Convert with convert_hf_to_gguf.py. Raises RuntimeError with the end of what it said."""
    server = _converter()
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps([*_arguments(checkpoint, output, outtype), *options]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        _converter.cache_clear()
        raise RuntimeError(f"llama.cpp's converter is gone: status {server.wait()}")
    said = json.loads(answer)
    if said["status"]:
        raise RuntimeError(f"llama.cpp's converter stopped: {said['output'][-3000:]}")


def peer_lora(adapter: Path, base: Path, output: Path) -> None:
    """Convert a LoRA adapter with convert_lora_to_gguf.py."""
    script = (peer_folder() / CONVERTER).with_name("convert_lora_to_gguf.py")
    _run([str(_python()), str(script), str(adapter), "--base", str(base), "--outfile", str(output)])


def peer_quantize(source: Path, output: Path, type: str, options: Sequence[str] = ()) -> None:
    """Quantize a GGUF file with llama-quantize."""
    quantizer, *arguments = quantizer_command(source, output, type)
    _run([quantizer, *options, *arguments])


def converter_command(checkpoint: Path, output: Path, outtype: str = "auto") -> list[str]:
    return [str(_python()), str(peer_folder() / CONVERTER), *_arguments(checkpoint, output, outtype)]


def quantizer_command(source: Path, output: Path, type: str) -> list[str]:
    return [str(peer_folder() / QUANTIZER), str(source), str(output), type]


def _arguments(checkpoint: Path, output: Path, outtype: str) -> list[str]:
    return [str(checkpoint), "--outfile", str(output), "--outtype", outtype]


@cache
def _converter() -> subprocess.Popen[str]:
    """The converter as `tests/peer_server.py` keeps it loaded, until this process ends."""
    command = [str(_python()), str(ROOT / "tests" / "peer_server.py"), str(peer_folder() / CONVERTER)]
    server = subprocess.Popen(
        command,
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin
    atexit.register(server.stdin.close)  # at the end of its input it ends
    return server


def _python() -> Path | None:
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return Path(sys.executable)
    named = os.environ.get("HANDMILL_PEER_PYTHON")
    other = Path(named) if named else ROOT / ".venv-parity" / "bin" / "python"
    return other if other.exists() else None


def _environment() -> dict[str, str]:
    # The converter looks for gguf beside itself first, as it should; nothing of it may ask the network.
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}")

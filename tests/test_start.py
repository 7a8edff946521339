"""Where an engine lives: in this process on a CPU, in one of its own where a device could end it."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import ModelFileError
from runner.devices import gpu_backend_files
from runner.engine.local import LocalEngine
from runner.engine.protocol import LoadOptions
from runner.engine.start import load
from runner.engine.supervised import SupervisedEngine
from tests.test_isolated import is_alive

CPU_BUILD = ("libllama.so", "libggml.so.0", "libggml-base.so", "libggml-cpu.so", "libggml-cpu-haswell.so")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (CPU_BUILD, []),
        ((*CPU_BUILD, "libggml-rpc.so", "libggml-blas.so"), []),
        ((*CPU_BUILD, "libggml-cuda.so.0", "libggml-cuda.so"), ["cuda"]),
        ((*CPU_BUILD, "libggml-vulkan.so"), ["vulkan"]),
        (("libggml-base.dylib", "libggml-cpu.dylib", "libggml-metal.dylib"), ["metal"]),
        (("ggml-base.dll", "ggml-cpu.dll", "ggml-hip.dll"), ["hip"]),
        ((), []),
    ],
)
def test_a_build_that_can_use_a_gpu_is_known_by_its_files(
    files: tuple[str, ...], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert gpu_backend_files() == expected


def test_an_engine_lives_where_nothing_else_ends_with_it(starter_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions(context=256, cache=0, workers=("127.0.0.1:1",))
    with load(starter_model, options) as engine:
        assert isinstance(engine, SupervisedEngine)
        assert engine.info.notes == ("worker 127.0.0.1:1 is away: Connection refused; it is left out",)
    with load(starter_model, LoadOptions(context=256, cache=0, workers=("127.0.0.1:1",), gpu_layers=0)) as engine:
        assert isinstance(engine, LocalEngine)
    for there, kind in ((["cuda"], SupervisedEngine), ([], LocalEngine)):
        monkeypatch.setattr("runner.engine.start.gpu_backend_files", lambda there=there: there)
        with load(starter_model, LoadOptions(context=256, cache=0)) as engine:
            assert isinstance(engine, kind)


def test_a_load_that_fails_leaves_no_process(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelFileError, match=r"broken\.gguf"):
        load(broken, LoadOptions(workers=("127.0.0.1:1",)))
    with pytest.raises(ModelFileError, match="nowhere"):
        load(tmp_path / "nowhere.gguf", LoadOptions(workers=("127.0.0.1:1",)))
    children = Path("/proc/self/task").glob("*/children")
    assert not [pid for file in children for pid in file.read_text().split() if is_alive(int(pid))]

"""What `make` decides before it installs: flags by hardware, which kept wheel fits, when there is nothing to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts import environment, llama_wheel
from scripts.console import SetupError
from scripts.llama_wheel import (
    Build,
    choose_flags,
    miscompiles_amx,
    missing_backends,
    provide_wheel,
    wanted_build,
    wheel_problem,
)

LIBRARIES = ["llama_cpp/lib/libggml-base.so", "llama_cpp/lib/libggml-rpc.so", "llama_cpp/lib/libllama.so"]


def program(folder: Path, name: str, prints: str = "", code: int = 0) -> Path:
    """A program that prints a text, to stand for nvcc, nvidia-smi or a compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {code}\n")
    path.chmod(0o755)
    return path


def write_wheel(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, name * 100)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs in front of PATH, on a machine that has no nvcc of its own."""
    tools = tmp_path / "tools"
    tools.mkdir()
    shown = [folder for folder in os.get_exec_path() if not (Path(folder) / "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join([str(tools), *shown]))
    monkeypatch.setattr(llama_wheel, "_CUDA_FOLDERS", ())
    for name in ("CUDA", "CUDA_HOME", "CUDA_PATH", "CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return tools


def gpu(tools: Path, model: str = "NVIDIA RTX 4090") -> None:
    program(tools, "nvidia-smi", f"GPU 0: {model} (UUID: GPU-1234)")


def test_flags() -> None:
    assert choose_flags(None) == ("-DGGML_RPC=ON", "-DLLAVA_BUILD=OFF")
    assert "-DGGML_CUDA=ON" in choose_flags("/opt/nvcc")
    assert choose_flags(None, ["-DGGML_VULKAN=ON"])[-1] == "-DGGML_VULKAN=ON"


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ("c++ (Debian 12.2.0-14+deb12u1) 12.2.0", True),
        ("g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", True),
        ("g++ (GCC) 13.2.1 20231205 (Red Hat 13.2.1-6)", True),
        ("g++ (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", False),
        ("c++ (Debian 14.2.0-19) 14.2.0", False),
    ],
)
def test_a_compiler_that_breaks_amx_is_known(version: str, affected: bool) -> None:
    assert miscompiles_amx(f"{version}\nCopyright (C) 2022 Free Software Foundation, Inc.\n") == affected
    assert not miscompiles_amx(version.replace("g++", "clang"))
    assert any("-mno-amx-int8" in flag for flag in choose_flags(None, without_amx=affected)) == affected


def test_cuda_takes_both_the_compiler_and_a_gpu(machine: Path) -> None:
    def backends() -> tuple[str, ...]:
        return wanted_build("1.0", os.environ).backends

    program(machine, "nvidia-smi", "No devices were found", code=6)
    assert backends() == ("rpc",)
    gpu(machine)
    assert backends() == ("rpc",)
    program(machine, "nvcc", "release 13.0")
    assert backends() == ("rpc", "cuda")
    program(machine, "nvidia-smi", "No devices were found", code=6)
    assert backends() == ("rpc",)


def test_cuda_can_be_overruled(machine: Path) -> None:
    with pytest.raises(SetupError, match="nvcc was not found"):
        wanted_build("1.0", os.environ | {"CUDA": "1"})
    program(machine, "nvcc", "release 13.0")
    assert wanted_build("1.0", os.environ | {"CUDA": "1"}).backends == ("rpc", "cuda")
    gpu(machine)
    assert wanted_build("1.0", os.environ | {"CUDA": "0"}).backends == ("rpc",)


def test_a_persons_own_flags_are_added(machine: Path) -> None:
    build = wanted_build("1.0", os.environ | {"CMAKE_ARGS": "-DGGML_VULKAN=ON '-DCMAKE_CXX_FLAGS=-O2 -g'"})
    assert build.flags[-1] == "-DCMAKE_CXX_FLAGS=-O2 -g"
    assert build.backends == ("rpc", "vulkan")


def test_the_key_tells_builds_apart(machine: Path) -> None:
    gpu(machine)
    program(machine, "nvcc", "release 13.0")
    cuda = wanted_build("1.0", os.environ)
    gpu(machine, "NVIDIA H200")
    other_gpu = wanted_build("1.0", os.environ)
    plain = wanted_build("1.0", os.environ | {"CUDA": "0"})
    newer = wanted_build("1.1", os.environ | {"CUDA": "0"})
    other_processor = Build(plain.version, plain.flags, plain.machine + " avx512f")
    builds = (cuda, other_gpu, plain, newer, other_processor)
    assert len({build.key for build in builds}) == len(builds)
    assert plain.key == wanted_build("1.0", os.environ | {"CUDA": "0"}).key
    assert plain.key.startswith("1.0-rpc-")


@pytest.mark.parametrize("name", ["libggml-rpc.so", "libggml-rpc.so.0", "libggml-rpc.dylib", "ggml-rpc.dll"])
def test_a_backend_is_known_by_its_library(name: str) -> None:
    assert missing_backends(["libggml-base.so", name], ["rpc"]) == ""
    assert missing_backends(["libggml-base.so", name], ["rpc", "cuda"]) == "libggml-cuda is missing"


def test_a_wheel_is_checked(tmp_path: Path) -> None:
    good = write_wheel(tmp_path / "good.whl", LIBRARIES)
    assert wheel_problem(good, ["rpc"]) == ""
    assert wheel_problem(good, ["rpc", "cuda"]) == "libggml-cuda is missing"
    # llama-cpp-python also leaves its libraries in lib/, from where nobody loads them.
    elsewhere = write_wheel(tmp_path / "elsewhere.whl", ["llama_cpp/lib/libggml-base.so", "lib/libggml-rpc.so"])
    assert wheel_problem(elsewhere, ["rpc"]) == "libggml-rpc is missing"
    content = good.read_bytes()
    (tmp_path / "short.whl").write_bytes(content[: len(content) // 2])
    assert "cannot be read" in wheel_problem(tmp_path / "short.whl", ["rpc"])
    (tmp_path / "flipped.whl").write_bytes(content.replace(b"libggml-rpc.so", b"libggml-rpX.so", 2))
    assert wheel_problem(tmp_path / "flipped.whl", ["rpc"])


def test_a_kept_wheel_is_used_and_a_broken_one_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build("1.0", choose_flags(None), "here")
    kept = write_wheel(tmp_path / build.key / "llama_cpp_python-1.0-py3-none-any.whl", LIBRARIES)
    assert provide_wheel(build, Path("python"), tmp_path) == kept

    kept.write_bytes(kept.read_bytes()[:50])
    monkeypatch.setattr(llama_wheel, "require_compilers", lambda _: None)
    monkeypatch.setattr(llama_wheel, "_compile", lambda build, python, home: write_wheel(home / "new.whl", LIBRARIES))
    assert provide_wheel(build, Path("python"), tmp_path).name == "new.whl"
    assert not kept.exists()


def test_building_reports_progress_and_keeps_the_wheel(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheel = write_wheel(tmp_path / "made" / "llama_cpp_python-1.0-py3-none-any.whl", LIBRARIES)
    steps = "\n".join(f"  [{step}/20] g++ -c x.cpp" for step in range(1, 21))
    python = program(tmp_path / "bin", "python", steps)
    # The stand-in for pip says the flags, and copies a finished wheel to where it should lie.
    copy = f'echo "$CMAKE_ARGS"; while [ "$1" != --wheel-dir ]; do shift; done; cp {wheel} "$2"'
    python.write_text(python.read_text().replace("exit 0", copy))
    build = Build("1.0", choose_flags(None), "here")
    made = provide_wheel(build, python, tmp_path / "kept")
    assert made == tmp_path / "kept" / build.key / wheel.name
    assert "-DGGML_RPC=ON -DLLAVA_BUILD=OFF" in (made.parent / "build.log").read_text()
    said = capfd.readouterr()
    assert said.out == ""
    assert "this takes minutes" in said.err
    assert said.err.count(" of 20") == 10


def test_a_failed_build_names_its_log_and_its_error(tmp_path: Path) -> None:
    python = program(tmp_path / "bin", "python", "[1/2] g++\nx.cpp:3: error: no such thing", code=1)
    build = Build("1.0", choose_flags(None), "here")
    with pytest.raises(SetupError, match=r"build\.log\n  x\.cpp:3: error: no such thing"):
        provide_wheel(build, python, tmp_path)
    assert [path.name for path in (tmp_path / build.key).iterdir()] == ["build.log"]


def test_a_missing_compiler_says_how_to_get_it(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine))
    with pytest.raises(SetupError, match="no C compiler was found"):
        llama_wheel.require_compilers({})
    monkeypatch.setenv("PATH", os.pathsep.join([str(machine), os.defpath]))
    program(machine, "mycc")
    with pytest.raises(SetupError, match="apt install build-essential"):
        llama_wheel.require_compilers({"CC": "mycc", "CXX": "not-there"})


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    build = Build("1.0", choose_flags(None), "here")
    plain = environment.wanted_stamp(venv, build, "", [])
    tests = environment.wanted_stamp(venv, build, "test", [])
    assert environment.outdated(venv, plain) == list(plain)
    environment._stamp(venv, tests, *tests)
    assert environment.outdated(venv, tests) == []
    assert environment.outdated(venv, plain) == []
    other = environment.wanted_stamp(venv, Build("1.0", choose_flags("/nvcc"), "here"), "", [])
    assert environment.outdated(venv, other) == ["wheel"]
    assert environment.outdated(venv, plain | {"python": "3.12"}) == list(plain)


def test_the_pinned_release_is_read_from_the_project() -> None:
    assert environment.llama_version().count(".") == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("model", ["a b.gguf", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "$HOME", "-x"])
def test_make_passes_the_model_as_typed(tmp_path: Path, model: str) -> None:
    """Real make, with stand-ins for Python and for what is installed."""
    shutil.copy(environment.ROOT / "Makefile", tmp_path)
    program(tmp_path / "bin", "python3")
    fake = tmp_path / ".venv" / "bin"
    program(fake, "python", "starter.gguf")
    handmill = program(fake, "handmill")
    handmill.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\ncat\n")
    # As from a shell: a make inside `make test` would be told of it, and say so on stdout.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "chat", f"MODEL={model}", f"PYTHON={tmp_path}/bin/python3"],
        cwd=tmp_path,
        env=outside,
        input="Hello\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"chat\n--\n{model}\nHello\n"
    assert not (tmp_path / "pwned").exists()

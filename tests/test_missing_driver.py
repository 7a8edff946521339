"""A CUDA build of llama.cpp where NVIDIA's driver is not: made here with a C compiler, linked as such a build is."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from models import missing_driver

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is an ELF library")


def compile_library(source: str, output: Path, *options: str) -> None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    file = output.parent / f"{output.name}.c"
    file.write_text(source)
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", str(output), str(file), *options], check=True)


@pytest.fixture
def cuda_build(tmp_path: Path) -> Path:
    """A folder of libraries: libllama needs libggml-cuda, and that the driver, which is gone after linking."""
    driver, folder = tmp_path / "driver", tmp_path / "lib"
    driver.mkdir()
    folder.mkdir()
    compile_library("int cuMemCreate(void) {return 0;}", driver / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    source = "int cuMemCreate(void); int uses(void) {return cuMemCreate();}"
    compile_library(source, folder / "libggml-cuda.so", f"-L{driver}", "-l:libcuda.so.1")
    for library in LIBRARIES.glob("lib*.so*"):
        if library.name != "libllama.so":
            (folder / library.name).symlink_to(library)
    linked = [
        f"-L{folder}",
        "-l:libllama.so.0",
        "-l:libggml-cuda.so",
        f"-Wl,--no-as-needed,--allow-shlib-undefined,-rpath,{folder}",
    ]
    compile_library(
        "int uses(void); int check(void) {return uses();}", folder / "libllama.so", linked[-1], *linked[:-1]
    )
    shutil.rmtree(driver)
    return folder


def handmill(folder: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner.cli.main", *arguments],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(folder), "HANDMILL_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.parametrize("command", ["run", "fit", "doctor"])
def test_the_cpu_computes_and_it_is_said(command: str, cuda_build: Path, tmp_path: Path, starter_model: Path) -> None:
    arguments = {
        "run": ["run", str(starter_model), "--json", "--max-tokens", "3", "Hello"],
        "fit": ["fit", str(starter_model), "--json"],
        "doctor": ["doctor", "--json"],
    }[command]
    done = handmill(cuda_build, tmp_path, *arguments)
    said = json.loads(done.stdout.splitlines()[-1])
    if command == "doctor":
        assert "CPU" in said["system"]["backends"]  # it was loaded
        found = [finding for finding in said["findings"] if finding["probe"] == "driver"]
        assert len(found) == 1
        assert "libcuda.so.1" in found[0]["message"]
        return
    assert done.returncode == 0, done.stderr
    assert said["gpu_layers"] == 0
    assert f"NVIDIA's driver is not here ({missing_driver.DRIVER} is missing)" in done.stdout + done.stderr


def test_another_library_that_is_missing_is_named(cuda_build: Path, tmp_path: Path, starter_model: Path) -> None:
    (cuda_build / "libggml-cuda.so").unlink()
    done = handmill(cuda_build, tmp_path, "run", str(starter_model), "Hello")
    assert done.returncode == 1
    assert "llama.cpp cannot be loaded" in done.stderr
    assert "libggml-cuda.so" in done.stderr
    assert "handmill doctor" in done.stderr
    assert "fault of handmill" not in done.stderr


def test_every_function_of_the_stand_in_says_that_there_is_no_device(tmp_path: Path) -> None:
    names = [b"cuInit", *(f"cuFunction{number}".encode() for number in range(3000))]
    path = tmp_path / "libstandin.so"
    machine = missing_driver._NO_DEVICE[os.uname().machine]
    path.write_bytes(missing_driver.library(b"libstandin.so.1", names, *machine))
    library = ctypes.CDLL(str(path))
    assert {getattr(library, name.decode())() for name in names} == {100}
    assert not hasattr(library, "cudaMalloc")

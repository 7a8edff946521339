"""Build the tools of llama.cpp that handmill is compared with, from the release that llama-cpp-python carries.

    python -m scripts.build_peer [llama-bench ...]

Leaves `build/peer/llama.cpp` (the source, with convert_hf_to_gguf.py) and the tools in `build/peer/build/bin`:
llama-quantize, and those that are named. Does nothing for what is there, or in the folder that HANDMILL_PEER names.
They are built for the CPU: with a GPU they are run on the libraries of the wheel, which are of the same release.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.console import Progress, SetupError, say
from scripts.environment import ROOT, llama_version
from scripts.llama_wheel import PACKAGE, require_compilers, wanted_build

CONVERTER = Path("llama.cpp", "convert_hf_to_gguf.py")
BINARIES = Path("build", "bin")
QUANTIZER = BINARIES / "llama-quantize"
_FOR_A_GPU = re.compile(r"-D(GGML_|CMAKE_)?(CUDA|VULKAN|HIP|SYCL)", re.IGNORECASE)
_STEP = re.compile(r"^\[\s*(\d+)%\]")


def peer_folder() -> Path:
    return Path(os.environ.get("HANDMILL_PEER") or ROOT / "build" / "peer")


def main() -> int:
    folder = peer_folder()
    tools = [tool for tool in {QUANTIZER.name, *sys.argv[1:]} if not (folder / BINARIES / tool).exists()]
    if (folder / CONVERTER).exists() and not tools:
        return 0
    try:
        build(folder, tools)
    except SetupError as error:
        say(f"handmill: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build(folder: Path, tools: Sequence[str]) -> None:
    require_compilers(os.environ)
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SetupError("cmake was not found. Install it: sudo apt install cmake")
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "llama.cpp"
    if not (folder / CONVERTER).exists():
        say("Fetching the source of llama.cpp ...")
        _fetch_source(source)
    say(f"Compiling {', '.join(sorted(tools))} to compare with. This takes minutes.")
    log = folder / "build.log"
    configure = [cmake, "-S", str(source), "-B", str(folder / "build"), "-G", "Unix Makefiles"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
    flags = wanted_build(llama_version(), os.environ).flags  # the same instructions as the wheel
    configure += [flag for flag in flags if not _FOR_A_GPU.match(flag)]  # whose kernels take long to compile
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compile_ = [cmake, "--build", str(folder / "build"), "--parallel", str(cores), "--target", *tools]
    with log.open("w", encoding="utf-8") as kept, Progress("compiled (percent)") as progress:
        for command in (configure, compile_):
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    kept.write(line)
                    if step := _STEP.match(line):
                        progress.show(int(step[1]), 100)
            if process.returncode:
                raise SetupError(f"llama.cpp's own tools did not compile. The log: {log}")


def _fetch_source(source: Path) -> None:
    """The source archive of llama-cpp-python holds all of llama.cpp under vendor/."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-input"]
        command += ["--no-deps", "--no-binary", PACKAGE, "--dest", folder, f"{PACKAGE}=={llama_version()}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise SetupError(f"pip cannot fetch the source of {PACKAGE}:\n{done.stderr.strip()}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        next(Path(folder).glob("*/vendor/llama.cpp")).rename(source)


if __name__ == "__main__":
    sys.exit(main())

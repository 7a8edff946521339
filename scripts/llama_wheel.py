"""The llama-cpp-python wheel for this machine: compiled once, kept, and checked before it is used.

pip's wheel cache is keyed by version and knows nothing of CMAKE_ARGS, so it hands out a wheel without the backends
asked for. The wheels made here lie in a folder of their own, one for each version, flags and hardware.

Runs on the system's Python before anything is installed, so it needs the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.console import Progress, SetupError, say

PACKAGE = "llama-cpp-python"
_STEP = re.compile(r"\[\s*(\d+)/(\d+)\]|\[\s*(\d+)%\]")  # ninja's lines, and those of Unix Makefiles
_LIBRARY = re.compile(r"(?:lib)?ggml-(\w+)\.(?:so|dylib|dll)")
_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where installers leave nvcc, often not on PATH

_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_NO_COMPILER = """llama.cpp is compiled for this machine, and no {language} compiler was found. Install one:
  Debian, Ubuntu   sudo apt install build-essential
  Fedora           sudo dnf install gcc gcc-c++
  macOS            xcode-select --install"""


@dataclass(frozen=True)
class Build:
    """What to compile, and what the result is tied to."""

    version: str
    flags: tuple[str, ...]
    machine: str
    """llama.cpp compiles for the very processor (and GPU) that it finds, so its wheel fits no other."""

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that the finished wheel must hold, beside the CPU's."""
        return tuple(
            name.lower() for name in re.findall(r"-DGGML_(RPC|CUDA|VULKAN|METAL|HIP|SYCL)=ON", " ".join(self.flags))
        )

    @property
    def key(self) -> str:
        digest = hashlib.sha256(repr((self.version, self.flags, self.machine)).encode()).hexdigest()
        return "-".join([self.version, *self.backends, digest[:12]])


def wanted_build(version: str, environment: Mapping[str, str]) -> Build:
    """The build for this machine. `CUDA=0` or `CUDA=1` overrules what is found; CMAKE_ARGS adds flags."""
    nvcc, gpus = find_nvcc(environment), nvidia_gpus()
    choice = environment.get("CUDA", "")
    if choice == "1" and not nvcc:
        raise SetupError("CUDA=1 asks for a CUDA build, and nvcc was not found. Install the CUDA toolkit.")
    cuda = nvcc if nvcc and choice != "0" and (gpus or choice == "1") else None
    extra = shlex.split(environment.get("CMAKE_ARGS", ""))
    machine = [sysconfig.get_platform(), *platform.libc_ver(), processor()]
    if cuda:
        machine += [*gpus, _output([cuda, "--version"])]
    amx = "amx_tile" in processor() and miscompiles_amx(_output([_compiler(environment), "--version"]))
    return Build(version, choose_flags(cuda, extra, without_amx=amx), "\n".join(machine))


def choose_flags(nvcc: str | None, extra: Iterable[str] = (), *, without_amx: bool = False) -> tuple[str, ...]:
    """The flags for cmake. `nvcc` is the CUDA compiler to use, None for a build without CUDA."""
    # The multimodal library is a quarter of the compilation, and handmill does not use it.
    flags = ["-DGGML_RPC=ON", "-DLLAVA_BUILD=OFF"]
    if nvcc:
        flags += ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if without_amx:
        flags += [f"-DCMAKE_{language}_FLAGS={_NO_AMX}" for language in ("C", "CXX")]
    return (*flags, *extra)


def miscompiles_amx(compiler: str) -> bool:
    """Whether a compiler, by what it says of itself, drops the stores that set AMX tiles up.

    GCC bug 114098, mended in 11.5, 12.4, 13.3 and 14: with it, llama.cpp ends the process at its first product.
    """
    version = re.match(r"[^\n]*?\)\s+(\d+)\.(\d+)\.\d+", compiler)
    if not version or "Free Software Foundation" not in compiler:
        return False
    major, minor = int(version[1]), int(version[2])
    return major < 14 and minor < {11: 5, 12: 4, 13: 3}.get(major, 1000)


def _compiler(environment: Mapping[str, str]) -> str:
    return next(iter(shlex.split(environment.get("CXX", ""))), "c++")


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    folders = [environment.get("PATH", os.defpath), *(f"{home}/bin" for home in homes), *_CUDA_FOLDERS]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def nvidia_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver lists, by model. Empty without a driver."""
    lines = _output(["nvidia-smi", "-L"]).splitlines()
    return [line.split("(UUID")[0].strip() for line in lines if line.startswith("GPU ")]


def processor() -> str:
    """The processor's model and instruction sets, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()
    facts = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", cpuinfo.read_text(), re.MULTILINE)
    return "\n".join(sorted(set(facts)))


def provide_wheel(build: Build, python: Path, folder: Path) -> Path:
    """The wheel of this build: the one kept, if it is whole, else a new one."""
    home = folder / build.key
    for wheel in home.glob("*.whl"):
        problem = wheel_problem(wheel, build.backends)
        if not problem:
            return wheel
        say(f"The kept wheel is not usable ({problem}); it is built again.")
        wheel.unlink()
    require_compilers(os.environ)
    return _compile(build, python, home)


def wheel_problem(wheel: Path, backends: Iterable[str]) -> str:
    """What is wrong with a wheel; nothing for a good one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            broken = archive.testzip()
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        return f"it cannot be read: {error}"
    if broken:
        return f"{broken} in it is broken"
    return missing_backends((name for name in names if name.startswith("llama_cpp/lib/")), backends)


def missing_backends(libraries: Iterable[str], backends: Iterable[str]) -> str:
    """Which backends have no library among these file names, as a phrase; nothing when all are there."""
    present = {match[1] for name in libraries if (match := _LIBRARY.match(Path(name).name))}
    missing = [f"libggml-{name}" for name in ("base", *backends) if name not in present]
    return f"{' and '.join(missing)} is missing" if missing else ""


def require_compilers(environment: Mapping[str, str]) -> None:
    # cmake and ninja are not looked for: where they are missing, pip brings them into its build environment.
    for language, variable, names in (("C", "CC", "cc gcc clang"), ("C++", "CXX", "c++ g++ clang++")):
        candidates = shlex.split(environment.get(variable, ""))[:1] or names.split()
        # They are run, since macOS has stubs that only offer to install the compiler.
        if not any(_output([name, "--version"]) for name in candidates):
            raise SetupError(_NO_COMPILER.format(language=language))


def _compile(build: Build, python: Path, home: Path) -> Path:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {
        "CMAKE_ARGS": shlex.join(build.flags),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(cores),
    }
    backends = " and ".join(name.upper() for name in build.backends)
    say(f"Compiling llama.cpp with {backends} for this machine, once. On {cores} cores this takes minutes.")
    home.mkdir(parents=True, exist_ok=True)
    log = home / "build.log"
    with tempfile.TemporaryDirectory(prefix="new-", dir=home) as folder:
        command = [str(python), "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--no-binary", PACKAGE, "--wheel-dir", folder]
        command += [f"{PACKAGE}=={build.version}"]
        started = time.monotonic()
        if not _run_with_progress(command, environment, log):
            raise SetupError(_failure(build, log))
        wheels = list(Path(folder).glob("*.whl"))
        problem = wheel_problem(wheels[0], build.backends) if wheels else "pip left no wheel"
        if problem:
            raise SetupError(f"llama.cpp compiled, but {problem}. The log: {log}")
        wheel = wheels[0].replace(home / wheels[0].name)
    say(f"Compiled in {time.monotonic() - started:.0f} s.")
    return wheel


def _run_with_progress(command: list[str], environment: Mapping[str, str], log: Path) -> bool:
    """Run pip, keep all it says in the log, and show how far the compilation is."""
    with (
        log.open("w", encoding="utf-8") as kept,
        Progress("compiled") as progress,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            if step := _STEP.search(line[:40]):
                done, total, percent = step.groups()
                progress.show(int(done or percent), int(total or 100))
    return process.returncode == 0


def _failure(build: Build, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
    telling = [line for line in lines if re.search(r"\berror\b|No space left|Killed", line, re.IGNORECASE)]
    shown = "".join(f"\n  {line[:200]}" for line in telling[:3])
    without = "\nWithout the GPU: make chat CUDA=0" if "cuda" in build.backends else ""
    return f"{PACKAGE} could not be built. The log: {log}{shown}{without}"


def _output(command: list[str]) -> str:
    """What a program prints; nothing when it is not there or fails."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

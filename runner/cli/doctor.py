"""What is here, what this build can use, what stands between, and the command that mends it.

Exit code 1 if something is badly wrong. --json prints one object: system (python, llama_cpp_python, backends,
processor, threads, memory_total, memory_available, memory_bytes_per_second, devices: name, description, kind, backend,
free, total; disk: path, file_system, bytes_per_second) and findings (probe, severity: error or warning, message,
command).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from models.text import human_bytes, printable
from runner.chat.render import json_line
from runner.cli.options import add_worker_option

if TYPE_CHECKING:
    from runner.doctor import Finding
    from runner.system import System

HELP = "what is here, what is slow, and the command that mends it"
ORDER = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_worker_option(parser)


def run(args: argparse.Namespace) -> int:
    from runner.bandwidth import memory_bandwidth
    from runner.doctor import examine, examine_workers
    from runner.system import gather

    system = gather()
    bandwidth = memory_bandwidth(system.threads)
    findings = [*examine(system), *examine_workers(args.worker)]
    if args.json:
        print(json_line({"system": _facts(system, bandwidth), "findings": [vars(finding) for finding in findings]}))
    else:
        _print(system, bandwidth, findings)
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _facts(system: System, bandwidth: float | None) -> dict[str, object]:
    disk = system.disk
    return {
        "python": system.python,
        "llama_cpp_python": system.llama_version,
        "backends": list(system.backends),
        "processor": system.processor,
        "threads": system.threads,
        "memory_total": system.memory_total,
        "memory_available": system.memory_available,
        "memory_bytes_per_second": None if bandwidth is None else round(bandwidth),
        "devices": [
            {
                "name": device.name,
                "description": device.description,
                "kind": device.kind,
                "backend": device.backend,
                "free": device.free,
                "total": device.total,
            }
            for device in system.devices
        ],
        "disk": None
        if disk is None
        else {
            "path": disk.path,
            "file_system": disk.kind,
            "bytes_per_second": None if disk.bytes_per_second is None else round(disk.bytes_per_second),
        },
    }


def _print(system: System, bandwidth: float | None, findings: list[Finding]) -> None:
    memory = f"{human_bytes(system.memory_available)} of {human_bytes(system.memory_total)} available"
    rows = [
        ("processor", f"{printable(system.processor)}, {system.threads} threads to compute with"),
        ("memory", memory if bandwidth is None else f"{memory}, read at {human_bytes(bandwidth)}/s"),
        ("llama.cpp", f"llama-cpp-python {system.llama_version}, backends {', '.join(system.backends) or 'unknown'}"),
    ]
    for device in system.offload:
        free = f"{human_bytes(device.free)} of {human_bytes(device.total)} free"
        rows.append((device.name, f"{device.description}, {free}"))
    if not system.offload:
        rows.append(("GPU", f"{', '.join(system.gpus)}: not used" if system.gpus else "none"))
    if disk := system.disk:
        speed = "" if disk.bytes_per_second is None else f", read at {human_bytes(disk.bytes_per_second)}/s"
        rows.append(("models", f"{printable(disk.path, 1000)} ({disk.kind or 'unknown file system'}{speed})"))
    for label, text in rows:
        print(f"{label:<10} {text}")
    print()
    for finding in findings:
        print(f"{finding.severity}: {printable(finding.message, 1000)}")
        if finding.command:
            print(f"  {printable(finding.command, 1000)}")
    if not findings:
        print("nothing stands between this machine and its models")

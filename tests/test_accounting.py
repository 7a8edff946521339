"""Bytes that are predicted against bytes that a load really takes, on loopback RPC devices and on a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models.gguf_parts import read_model
from models.isolated import isolation
from runner import devices
from runner.devices import Device
from tests.memory_models import write_model
from tests.rpc_server import rpc_server

MODELS = ("starter", "dense", "experts", "window", "recurrent", "hybrid")

# In a process of its own: a device once registered stays. What it prints of the real load is llama.cpp's log.
PROGRAM = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from models import native
from runner import rpc
from runner.engine import accounting
from runner.engine.context import Context
from runner.engine.context_params import ContextOptions
from runner.engine.model_params import model_params
from runner.placement import Split
model, endpoints, cases = Path(sys.argv[1]), sys.argv[2].split(","), json.loads(sys.argv[3])
for endpoint in filter(None, endpoints):
    rpc.add_server(endpoint)
lib, exact = native.library(), accounting.breakdown
for case in cases:
    split = Split(tuple(map(tuple, case["layers"])), tuple(case["on_cpu"]))
    options = ContextOptions(case["n_ctx"], 1, 1, type_k=case["kv"], type_v=case["kv"])
    found = {}
    for name, way in (("exact", exact), ("log", lambda context: None)):
        accounting.breakdown = way
        found[name] = {key: asdict(value) for key, value in accounting.account(model, split, options).items()}
    with native.capture_log() as log:
        params = model_params(split)
        params.use_extra_bufts = True
        loaded = native.load_model(model, params)
        context = Context(loaded, options)
    found["said"] = log.lines
    context.close()
    lib.llama_model_free(loaded)
    print(json.dumps(found))
"""
_BUFFER = re.compile(r" (\S+) +(model|KV|RS|compute) buffer size = +([\d.]+) MiB")
_KINDS = {"model": "weights", "KV": "kv", "RS": "kv", "compute": "compute"}


@dataclass(frozen=True)
class Machine:
    """Servers to use, and devices by what llama.cpp's log calls their memory."""

    endpoints: tuple[str, ...]
    names: Mapping[str, str]


@pytest.fixture(scope="module", params=["loopback", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if request.param == "gpu":
        with isolation() as apart:
            found: list[Device] = apart.call(devices.devices)
        gpu = devices.offload_devices(found)[0]
        yield Machine((), {gpu.buffer_type: gpu.name})
        return
    if "RPC" not in devices.backends():
        pytest.skip("this build has no RPC backend")
    with rpc_server() as one, rpc_server() as two:
        yield Machine((one, two), {f"RPC0[{one}]": "RPC0", f"RPC0[{two}]": "RPC1"})


def predicted_and_real(model: Path, machine: Machine, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    filled = [{"on_cpu": [], "n_ctx": 1024, "kv": 1} | case for case in cases]
    command = [sys.executable, "-c", PROGRAM, str(model), ",".join(machine.endpoints), json.dumps(filled)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def real_buffers(said: list[str], names: Mapping[str, str]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {name: Counter() for name in names.values()}
    for line in said:
        if (match := _BUFFER.search(line)) and match[1] in names:
            found[names[match[1]]][_KINDS[match[2]]] += round(float(match[3]) * (1 << 20))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_predicted_is_what_a_load_takes(
    kind: str, machine: Machine, tmp_path: Path, starter_model: Path
) -> None:
    path = starter_model if kind == "starter" else write_model(kind, tmp_path)
    gguf = read_model(path)
    blocks = gguf.integer(f"{gguf.architecture}.block_count") or 0
    part = "exps" if kind == "experts" else "ffn_down"
    kept = [t.name for t in gguf.tensors if part in t.name and t.name.startswith(f"blk.{blocks - 1}.")]
    one, *two = machine.names.values()
    cases: list[dict[str, Any]] = [
        {"layers": [[one, blocks + 1]]},
        {"layers": [[one, blocks // 2 + 1]], "n_ctx": 3000},
        {"layers": [*([name, 1] for name in two), [one, blocks]], "n_ctx": 700},
        {"layers": [[one, blocks]], "on_cpu": kept},
    ]
    if kind == "starter":
        cases.append({"layers": [*([name, 4] for name in two), [one, 9]], "kv": 8})
    results = predicted_and_real(path, machine, *cases)
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        # With all layers on several devices a prompt's parts overlap, over four copies of what crosses. Where it only
        # measures, llama.cpp forgets that a block's first norm is to be on the block's device, and counts it, too.
        overlap = any("pipeline parallelism enabled" in line for line in result["said"])
        copies = 4 * 512 * 4 * (gguf.integer(f"{gguf.architecture}.embedding_length") or 0) if overlap else 0
        real = real_buffers(result["said"], machine.names)
        assert sum(sum(buffers.values()) for buffers in real.values()) > 0
        for way in ("exact", "log"):
            for device, buffers in real.items():
                expected = result[way].get(device, {})
                total, taken = sum(expected.values()), sum(buffers.values())
                # the log rounds each of a few lines to 0.01 MiB
                assert 0.99 * taken - 32_000 <= total <= 1.03 * taken + 32_000 + copies, (way, device, case)
                for what in ("weights", "kv"):
                    assert abs(expected.get(what, 0) - buffers[what]) <= 0.01 * buffers[what] + 16_000
        for device in result["exact"]:
            by_map, by_log = (sum(result[way][device].values()) for way in ("exact", "log"))
            assert by_log == pytest.approx(by_map, rel=0.01, abs=32_000)

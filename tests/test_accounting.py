"""Bytes that are predicted against bytes that a load really takes, on loopback RPC devices."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.gguf_parts import read_model
from runner.devices import backends
from tests.memory_models import write_model
from tests.rpc_server import rpc_server

MODELS = ("starter", "dense", "experts", "window", "recurrent", "hybrid")

pytestmark = pytest.mark.skipif("RPC" not in backends(), reason="this build has no RPC backend")

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
for endpoint in endpoints:
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
_BUFFER = re.compile(r"(RPC\d\[\S+\]) +(model|KV|RS|compute) buffer size = +([\d.]+) MiB")
_KINDS = {"model": "weights", "KV": "kv", "RS": "kv", "compute": "compute"}


@pytest.fixture(scope="module")
def endpoints() -> Iterator[list[str]]:
    with rpc_server() as one, rpc_server() as two:
        yield [one, two]


def predicted_and_real(model: Path, endpoints: list[str], *cases: dict[str, Any]) -> list[dict[str, Any]]:
    filled = [{"on_cpu": [], "n_ctx": 1024, "kv": 1} | case for case in cases]
    command = [sys.executable, "-c", PROGRAM, str(model), ",".join(endpoints), json.dumps(filled)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def real_buffers(said: list[str], endpoints: list[str]) -> dict[str, Counter[str]]:
    names = {f"RPC0[{endpoint}]": f"RPC{index}" for index, endpoint in enumerate(endpoints)}
    found: dict[str, Counter[str]] = {name: Counter() for name in names.values()}
    for line in said:
        if match := _BUFFER.search(line):
            found[names[match[1]]][_KINDS[match[2]]] += round(float(match[3]) * (1 << 20))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_predicted_is_what_a_load_takes(
    kind: str, endpoints: list[str], tmp_path: Path, starter_model: Path
) -> None:
    path = starter_model if kind == "starter" else write_model(kind, tmp_path)
    gguf = read_model(path)
    blocks = gguf.integer(f"{gguf.architecture}.block_count") or 0
    part = "exps" if kind == "experts" else "ffn_down"
    kept = [t.name for t in gguf.tensors if part in t.name and t.name.startswith(f"blk.{blocks - 1}.")]
    cases: list[dict[str, Any]] = [
        {"layers": [["RPC0", blocks + 1]]},
        {"layers": [["RPC0", blocks // 2 + 1]], "n_ctx": 3000},
        {"layers": [["RPC1", 1], ["RPC0", blocks]], "n_ctx": 700},
        {"layers": [["RPC0", blocks]], "on_cpu": kept},
    ]
    if kind == "starter":
        cases.append({"layers": [["RPC1", 4], ["RPC0", 9]], "kv": 8})
    results = predicted_and_real(path, endpoints, *cases)
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        # With all layers on several devices a prompt's parts overlap, and llama.cpp counts four copies of what
        # crosses to the last device that it then does not need.
        overlap = any("pipeline parallelism enabled" in line for line in result["said"])
        copies = 4 * 512 * 4 * (gguf.integer(f"{gguf.architecture}.embedding_length") or 0) if overlap else 0
        real = real_buffers(result["said"], endpoints)
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

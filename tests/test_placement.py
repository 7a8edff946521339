"""Which layers go where: reckoned on headers, proved on a loopback RPC device."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.errors import LoadError
from models.gguf_file import GgufFile, LazyArray, TensorInfo, read_gguf
from runner import placement
from runner.devices import backends
from runner.engine import choices
from runner.engine.model_params import cpu_patterns
from runner.engine.protocol import LoadOptions
from runner.placement import Buffers, Placement, Settings, Split, bytes_per_token, fewer_layers, fill, read_layers
from tests.header_models import write_header
from tests.memory_models import write_model
from tests.rpc_server import rpc_server

MB = 1_000_000


NOWHERE = Split()


def header(*, blocks: int = 4, output: bool = True, **metadata: Any) -> GgufFile:
    """Blocks of 10 MB, an embedding of 20 MB, an output of 30 MB or none; 4 kB of cache a token and block."""
    sizes = {"token_embd.weight": 20 * MB, **{f"blk.{i}.w": 10 * MB for i in range(blocks)}}
    if output:
        sizes["output.weight"] = 30 * MB
    known: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": blocks,
        "llama.embedding_length": 1024,
        "llama.attention.head_count": 16,
    }
    tensors = tuple(TensorInfo(name, (1,), "F16", 0, size) for name, size in sizes.items())
    return GgufFile(Path("x.gguf"), 3, 0, {**known, **metadata}, tensors)


def array(*items: int) -> LazyArray:
    values = LazyArray(Path("x.gguf"), 0, 5, len(items))
    values._items = list(items)
    return values


def test_bytes_of_layers() -> None:
    assert read_layers(header()).weights == (10 * MB,) * 4 + (30 * MB,)
    assert read_layers(header(output=False)).weights == (10 * MB,) * 4 + (20 * MB,)
    assert read_layers(header()).kv == (4096,) * 4 + (0,)
    few: dict[str, Any] = {"llama.attention.head_count_kv": 2, "llama.attention.key_length": 128}
    few_heads = header(**few)
    assert placement.kv_bytes_per_token(few_heads) == [2 * 2 * (128 + 64)] * 4


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count": "many"},
        {"llama.attention.head_count": -16},
        {"llama.attention.head_count": array(0, -1)},
        {"llama.attention.head_count_kv": array(-8, -8, -8, -8)},
        {"llama.block_count": 10**9},
        {"llama.block_count": -1},
        {"llama.embedding_length": None},
    ],
)
def test_a_header_that_makes_no_sense_does_no_harm(metadata: dict[str, Any]) -> None:
    layers = read_layers(header(**metadata))
    assert layers.count == 5
    assert all(kv >= 0 for kv in layers.kv)


def test_the_real_models_bytes(starter_model: Path) -> None:
    gguf = read_gguf(starter_model)
    layers = read_layers(gguf)
    embedding = next(tensor.nbytes for tensor in gguf.tensors if tensor.name == "token_embd.weight")
    assert layers.count == 31
    assert sum(layers.weights) == sum(tensor.nbytes for tensor in gguf.tensors)
    assert layers.weights[-1] > embedding
    assert sum(layers.kv) == 30 * 2 * 2 * 192
    assert [name for name, _ in layers.movable[3]] == [f"blk.3.ffn_{part}.weight" for part in ("down", "gate", "up")]


def test_devices_are_filled_from_the_output() -> None:
    assert fill([10, 10, 10, 30], [45, 25]) == [2, 2]
    assert fill([10, 10, 10, 30], [29, 45]) == [0, 2]
    assert fill([10, 10, 10, 30], [100, 100]) == [4, 0]
    assert fill([1.5, 1.5], [2]) == [1]
    assert fill([10], []) == []


def test_fewer_layers_end_on_the_cpu() -> None:
    assert list(fewer_layers(31)) == [23, 15, 7, 0]
    assert list(fewer_layers(1)) == [0]
    assert list(fewer_layers(2)) == [1, 0]
    assert list(fewer_layers(0)) == []


def test_with_fewer_layers_each_device_keeps_its_share() -> None:
    split = Split((("A", 20), ("B", 11)), ("blk.3.ffn_up.weight",))
    assert split.fewer(23) == Split((("A", 15), ("B", 8)), ("blk.3.ffn_up.weight",))
    assert split.fewer(1).gpu_layers == 1
    assert split.fewer(0).gpu_layers == 0


def test_what_stays_on_the_cpu_is_found_by_few_patterns() -> None:
    kept = [f"blk.{i}.ffn_{part}_exps.weight" for i in (1, 2, 12) for part in ("up", "gate", "down")]
    kept += ["blk.21.ffn_down_exps.weight", "blk.3.exp_probs_b.bias"]
    others = [f"blk.{i}.ffn_{part}_exps.weight" for i in (0, 3, 11, 22, 121) for part in ("up", "down")]
    others += ["blk.21.ffn_up_exps.weight", "blk.1.ffn_up.weight", "blk.1.ffn_up_exps.bias", "output.weight"]
    patterns = cpu_patterns(kept)
    assert len(patterns) == 3
    assert [name for name in kept + others if any(re.search(pattern, name) for pattern in patterns)] == kept
    assert cpu_patterns(["output.weight", "blk.1.a|b.weight", "blk.1.(x.weight"]) == []


def test_weights_read_for_a_token(starter_model: Path) -> None:
    gguf = read_gguf(starter_model)
    layers = read_layers(gguf)
    everything = sum(tensor.nbytes for tensor in gguf.tensors)
    # Its embedding is tied: it is read whole, as the output.
    assert bytes_per_token(gguf, Split()) == {"CPU": everything}
    some = bytes_per_token(gguf, Split((("B", 3), ("A", 2)), ("blk.29.ffn_up.weight",)))
    up = dict(layers.movable[29])["blk.29.ffn_up.weight"]
    assert some["CPU"] == sum(layers.weights[:26]) + up
    assert some["B"] == sum(layers.weights[26:29])
    assert some["A"] == sum(layers.weights[29:]) - up
    counts: dict[str, Any] = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    untied = header(**counts)
    exps = TensorInfo("blk.1.ffn_up_exps.weight", (1,), "F16", 0, 80 * MB)
    found = bytes_per_token(replace(untied, tensors=(*untied.tensors, exps)), Split((("A", 1),)))
    assert found == {"CPU": 4 * 10 * MB + 20 * MB, "A": 30 * MB}


def test_blocks_that_only_predict_further_tokens_take_nothing() -> None:
    """They are not loaded, unless the model guesses with them."""
    extra_block: dict[str, Any] = {"llama.nextn_predict_layers": 1}
    plain, extra = header(), header(**extra_block)
    layers = read_layers(extra)
    assert layers.count == read_layers(plain).count
    assert (layers.weights[-2], layers.movable[-2], layers.kv[-2]) == (0, (), 0)
    assert layers.weights[:-2] == read_layers(plain).weights[:-2]
    gone = bytes_per_token(plain, Split())["CPU"] - bytes_per_token(extra, Split())["CPU"]
    assert gone == read_layers(plain).weights[-2] > 0


def test_what_is_left_for_the_cpu_must_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    gguf = replace(header(), size=300 * MB)

    def holds(plan: Placement, **limits: int) -> bool:
        monkeypatch.setattr(choices, "memory_limits", lambda: dict(limits))
        monkeypatch.setattr(choices, "available_memory", lambda: min(limits.values()))
        return choices.holds_weights(gguf, plan, notes)

    buffers = {"GPU": Buffers(900 * MB, 900 * MB, 9 * MB), "CPU": Buffers(500 * MB, 80 * MB, 20 * MB)}
    plan = Placement(Split((("GPU", 3),)), 5, Settings(9000), "as many as fit", buffers)
    assert holds(plan)
    assert holds(plan, machine=600 * MB)
    assert holds(plan, machine=600 * MB, process=900 * MB + (128 << 20))  # a limit on addresses counts the file, too
    assert notes == []
    assert not holds(plan, machine=600 * MB, process=899 * MB + (128 << 20))
    assert not holds(plan, machine=599 * MB)
    assert notes[-1].startswith("600 MB are needed beside what a GPU holds, and 599 MB")
    assert not holds(replace(plan, split=Split()), machine=599 * MB)
    assert notes[-1].startswith("600 MB are needed, and 599 MB of memory are available: weights will be read")
    with pytest.raises(LoadError, match="context of 9000 tokens takes 100 MB"):
        holds(plan, machine=99 * MB)
    assert holds(replace(plan, buffers={}), machine=99 * MB)  # there was no reason to ask for them


def test_llama_is_asked_for_bytes_only_where_memory_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = header()
    weights = sum(tensor.nbytes for tensor in gguf.tensors)
    cache = 1000 * sum(placement.kv_bytes_per_token(gguf))

    def may_lack(available: int | None, split: Split = NOWHERE) -> bool:
        monkeypatch.setattr(choices, "memory_limits", lambda: {} if available is None else {"machine": available})
        return choices.may_lack_memory(gguf, Placement(split, 5, Settings(1000), ""))

    assert not may_lack(None)
    assert not may_lack((weights + cache) * 8 // 7 + 8)
    assert may_lack(weights + cache)
    layers = read_layers(gguf)
    assert not may_lack(weights + cache, Split((("GPU", layers.count),)))


def test_a_context_that_a_gpu_may_hold_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "available_memory", lambda: 10 * MB)
    options = LoadOptions(context=100_000)
    with pytest.raises(LoadError, match="100000 tokens takes"):
        choices.choose_context(header(), options)
    assert choices.choose_context(header(), options, offload=True) == (100_000, [])


# Each in a process of its own: a device once registered stays, and one that is lost ends the process.
PROGRAM = """
import json, sys
from pathlib import Path
from models import native
from runner.rpc import add_server
from runner.engine.local import load
from runner.engine.protocol import LoadOptions, Sampling
model, endpoints, *wanted = sys.argv[1:]
for endpoint in filter(None, endpoints.split(",")):
    add_server(endpoint)
for options in map(json.loads, wanted):
    with native.capture_log() as log:
        engine = load(Path(model), LoadOptions(repack=False, cache=0, **options))
    with engine:
        tokens = engine.encode_text("Once upon a time, in a small village,")
        chunks = list(engine.generate(tokens, Sampling(temperature=0.0, max_tokens=8)))
    print(json.dumps({
        "text": "".join(chunk.text for chunk in chunks),
        "gpu_layers": engine.info.gpu_layers,
        "device": engine.info.device,
        "n_ctx": engine.info.n_ctx,
        "notes": engine.info.notes,
        "on_device": sum("assigned to device RPC" in line for line in log.lines),
        "said": [line for line in log.lines if "buffer size" in line or "overridden" in line],
    }))
"""
_BUFFER = re.compile(r"(RPC0\[\S+\]) .*buffer size = +([\d.]+) MiB")


def run(model: Path, endpoints: str, *wanted: dict[str, Any]) -> list[dict[str, Any]]:
    options = [json.dumps({"context": 256} | options) for options in wanted]
    command = [sys.executable, "-c", PROGRAM, str(model), endpoints, *options]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def bytes_taken(said: list[str]) -> dict[str, int]:
    """By device (its buffer type names its server), as a load logged it."""
    found: dict[str, int] = {}
    for match in filter(None, map(_BUFFER.search, said)):
        found[match[1]] = found.get(match[1], 0) + int(float(match[2]) * (1 << 20))
    return found


needs_rpc = pytest.mark.skipif("RPC" not in backends(), reason="this build has no RPC backend")


@needs_rpc
def test_layers_on_a_device_give_the_text_of_the_cpu(starter_model: Path) -> None:
    with rpc_server() as endpoint:
        cpu, some, everything, auto = run(
            starter_model, endpoint, *({"gpu_layers": layers} for layers in (0, 12, "all", "auto"))
        )
    assert [run["gpu_layers"] for run in (cpu, some, everything, auto)] == [0, 12, 31, 31]
    assert [run["on_device"] for run in (cpu, some, everything, auto)] == [0, 12, 31, 31]
    assert cpu["text"] == some["text"] == everything["text"] == auto["text"]
    assert cpu["text"]
    assert cpu["device"] == "CPU"
    assert everything["device"].startswith("RPC0")
    assert all(run["notes"] == [] for run in (cpu, some, everything, auto))


@needs_rpc
@pytest.mark.parametrize("megabytes", [260, 4])
def test_a_device_without_the_memory_gets_less(starter_model: Path, megabytes: int) -> None:
    with rpc_server(memory=megabytes * MB) as endpoint:
        (result,) = run(starter_model, endpoint, {"gpu_layers": "all", "context": 8192})
    assert result["notes"][0].startswith("the GPU has no memory for 31 layers; tried again with ")
    assert result["text"]
    if megabytes == 260:  # weights and cache of all layers take 287 MB there, those of 23 layers 218 MB
        assert result["gpu_layers"] == 23
        assert result["device"].startswith("RPC0")
    else:
        assert result["gpu_layers"] == 0
        assert result["device"] == "CPU"
        assert result["notes"][-1].endswith("the CPU alone")


def test_without_a_gpu_one_line_says_why(starter_model: Path) -> None:
    (result,) = run(starter_model, "", {"gpu_layers": "auto"})
    if result["gpu_layers"] == 0:
        assert len(result["notes"]) == 1
        assert result["notes"][0].startswith("CPU only: ")


@needs_rpc
def test_a_load_takes_what_it_may_of_each_device(starter_model: Path) -> None:
    cap = 55 * MB
    with rpc_server(memory=1000 * MB) as one, rpc_server(memory=1000 * MB) as two:
        cpu, capped, reduced = run(
            starter_model,
            f"{one},{two}",
            {"gpu_layers": 0, "context": 2048},
            {"vram": cap, "context": 2048},
            {"vram": 90 * MB, "context": "auto", "kv_types": "auto"},
        )
    taken = bytes_taken(capped["said"])
    assert len(taken) == 2
    assert all(0.75 * cap < size <= cap + MB for size in taken.values())
    assert 0 < capped["gpu_layers"] < 31
    assert capped["on_device"] == capped["gpu_layers"]
    assert capped["notes"][-1].startswith(f"{capped['gpu_layers']}/31 layers on RPC1+RPC0: as many as fit the 110 MB")
    assert capped["text"] == cpu["text"]
    assert reduced["gpu_layers"] == 31
    assert reduced["n_ctx"] < 8192
    assert [note.split(" ")[0] for note in reduced["notes"][:2]] == ["the", "context"]


@needs_rpc
def test_experts_stay_on_the_cpu_and_attention_does_not(tmp_path: Path) -> None:
    model = write_model("experts", tmp_path)
    with rpc_server(memory=1000 * MB) as endpoint:
        cpu, capped = run(model, endpoint, {"gpu_layers": 0, "context": 512}, {"vram": 4 * MB, "context": 512})
    assert capped["gpu_layers"] == 7
    kept = [line for line in capped["said"] if "overridden to CPU" in line]
    assert kept
    assert all("_exps" in line for line in kept)
    assert "experts of " in capped["notes"][-1]
    assert capped["text"] == cpu["text"]
    assert all(size <= 4 * MB for size in bytes_taken(capped["said"]).values())


@needs_rpc
@pytest.mark.parametrize(("number", "says"), [(signal.SIGKILL, "refused"), (signal.SIGSTOP, "longer than 3 s")])
def test_a_device_that_is_away_when_it_is_asked_costs_a_note(number: int, says: str, starter_model: Path) -> None:
    lose = f"from runner import planner; planner.QUESTION_SECONDS = 3\nimport os; os.kill(server, {number})\n"
    program = PROGRAM.replace("for options in map", lose + "for options in map")
    program = program.replace("model, endpoints", "server = int(sys.argv.pop())\nmodel, endpoints", 1)
    with rpc_server() as endpoint:
        processes = Path("/proc").glob("[0-9]*/cmdline")
        server = next(file.parent.name for file in processes if endpoint.encode() in file.read_bytes())
        command = [sys.executable, "-c", program, str(starter_model), endpoint, '{"context": 256}', server]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
        os.kill(int(server), signal.SIGCONT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["gpu_layers"] == 0
    assert result["notes"][0].startswith("no GPU is used: ")
    assert says in result["notes"][0]
    assert result["text"]


LIMITED = """
import json, re, resource, sys
from pathlib import Path
import numpy
from models import native
from runner.engine.local import load
from runner.engine.memory import taken_addresses
from runner.engine.protocol import LoadOptions, Sampling
path, room = Path(sys.argv[1]), int(sys.argv[2])
native.library()
resource.setrlimit(resource.RLIMIT_AS, (taken_addresses() + room, resource.RLIM_INFINITY))
with load(path, LoadOptions(context=256, gpu_layers=0, cache=0, threads=1)) as engine:
    count = len(list(engine.generate([1, 300], Sampling(temperature=0, max_tokens=2))))
    own = int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps({"count": count, "own": own, "notes": engine.info.notes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on addresses is one on Linux only")
@pytest.mark.parametrize("room", [500 * MB, 1500 * MB])
def test_weights_that_memory_does_not_hold_stay_in_the_file(room: int, tmp_path: Path) -> None:
    """A model of 300 MB, which llama.cpp would copy into another layout where the processor has one."""
    path = write_header(tmp_path / "x.gguf", blocks=8, width=2048, feed_forward=8192, heads=32, kv_heads=8)
    size = path.stat().st_size
    assert 250 * MB < size < 350 * MB
    command = [sys.executable, "-c", LIMITED, str(path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["count"] > 0
    said = any("weights will be read from the disk" in note for note in found["notes"])
    assert said == (room < 3 * size)
    if said:
        assert found["own"] < size // 2

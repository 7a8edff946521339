"""`handmill fit`: the plan of a model that is not loaded, here or on the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import hub, library
from models.errors import ModelFileError
from models.gguf_file import read_gguf
from models.hub_files import HubRef
from runner.bandwidth import DeviceSpeed
from runner.cli import main as cli
from runner.devices import Device, backends
from runner.engine import choices
from runner.engine.protocol import LoadOptions
from runner.fit import Fitter, summary
from runner.placement import CPU, Buffers, Placement, Settings, Split, bytes_sent, read_layers
from runner.placing import Wish
from runner.planner import planner
from tests.checkpoints import tiny_checkpoint, write_tiny_tokenizer
from tests.header_models import write_header
from tests.hub_server import Hub, serve
from tests.rpc_server import rpc_server

MB, GB = 1_000_000, 1_000_000_000
FIELDS = "name path bytes fits gpu_layers n_layers context kv_type tokens_per_second tokens_per_second_full"
FIELDS += " reason notes advice devices"


def test_json_has_the_documented_fields(starter_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", str(starter_model), "--json", "-c", "1024", "-g", "0", "-j", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(FIELDS.split())
    assert (found["gpu_layers"], found["n_layers"], found["context"], found["kv_type"]) == (0, 31, 1024, "f16")
    assert found["fits"] is True
    cpu = next(device for device in found["devices"] if device["name"] == "CPU")
    assert set(cpu) == {"name", "layers", "weights", "kv", "compute", "free", "link_seconds"}
    assert cpu["weights"] == sum(tensor.nbytes for tensor in read_gguf(starter_model).tensors)
    assert cpu["kv"] == 1024 * 30 * 2 * 2 * 192
    assert found["tokens_per_second"] > found["tokens_per_second_full"] > 0


def test_the_table_and_the_ranking(tmp_path: Path, starter_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = library.models_folder()
    folder.mkdir(parents=True)
    (folder / "small.gguf").symlink_to(starter_model)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    write_header(folder / "vast.gguf", blocks=90, width=16384, feed_forward=65536, heads=128, kv_heads=16)
    assert cli.main(["fit", "small", "-c", "512", "-j", "1"]) == 0
    out = capsys.readouterr().out
    assert "device   layers  weights KV cache  compute     free" in out
    assert "at most" in out
    assert "CPU      █" in out or "CPU      ▒" in out or "CPU      ·" in out
    assert cli.main(["fit", "--all", "-c", "512", "-j", "1", "-g", "0"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["small", "vast", "broken"]
    assert "does not fit: CPU needs" in rows[1]
    assert cli.main(["fit", "--all", "small"]) == 2


class MadeUp:
    """A planner of a machine that is not there: a GPU and a CPU, and a model of five layers of 100 MB."""

    def __init__(self, gpu: int, ram: int = 16 * GB, speeds: Mapping[str, DeviceSpeed] | None = None) -> None:
        self.found = [Device("GPU0", "", "gpu", gpu, gpu, "RPC"), Device(CPU, "", "cpu", ram, ram, "CPU")]
        self.speeds = speeds or {}

    def devices(self) -> list[Device]:
        return self.found

    def speed(self, device: str, tensor_type: str, threads: int) -> DeviceSpeed | None:
        return self.speeds.get(device)

    def in_order(self, gguf: Any, available: Any, threads: int) -> Any:
        return available

    def place(self, gguf: Any, available: Any, wish: Any, *, repack: bool = True) -> Placement:
        room = available[0].free if available else 0
        kv = wish.settings.n_ctx * (1000 if wish.settings.kv_types[0] == "f16" else 500)
        count = min(5, room // (100 * MB + kv))
        gpu = Buffers(count * 100 * MB, count * kv, MB)
        buffers = {"GPU0": gpu, CPU: Buffers((5 - count) * 100 * MB, (5 - count) * kv, MB)}
        return Placement(Split((("GPU0", count),)), 5, wish.settings, "made up", buffers)


@pytest.fixture
def five_layers(tmp_path: Path) -> Path:
    path = tmp_path / "five.gguf"
    return write_header(path, blocks=4, width=1024, feed_forward=4096, heads=16, kv_heads=16, context=32_768)


def made_up_fitter(*args: Any, **kwargs: Any) -> Fitter:
    made_up: Any = MadeUp(*args, **kwargs)
    return Fitter(made_up)


def test_tokens_per_second_are_bytes_over_speed_of_each_device(five_layers: Path) -> None:
    speeds = {"GPU0": DeviceSpeed(100 * GB, 0.001), CPU: DeviceSpeed(10 * GB, 0.0)}
    gguf = read_gguf(five_layers)
    found = made_up_fitter(250 * MB, speeds=speeds).fit(gguf, LoadOptions(context=1000))
    weights = read_layers(gguf).weights
    on_gpu, on_cpu = sum(weights[-2:]), sum(weights[:-2])
    assert found.placement.gpu_layers == 2
    assert found.tokens_per_second == pytest.approx(1 / (on_gpu / (100 * GB) + 0.001 + on_cpu / (10 * GB)))
    full = (on_gpu + 2 * MB) / (100 * GB) + 0.001 + (on_cpu + 3 * MB) / (10 * GB)
    assert found.tokens_per_second_full == pytest.approx(1 / full)
    unknown = made_up_fitter(250 * MB, speeds={CPU: speeds[CPU]}).fit(gguf, LoadOptions(context=1000))
    assert unknown.tokens_per_second is None
    assert "unknown" in summary(unknown)


def test_what_does_not_fit_is_said_and_has_no_speed(five_layers: Path) -> None:
    speeds = {"GPU0": DeviceSpeed(GB, 0), CPU: DeviceSpeed(GB, 0)}
    fitter = made_up_fitter(150 * MB, ram=350 * MB, speeds=speeds)
    found = fitter.fit(read_gguf(five_layers), LoadOptions(context=100))
    assert not found.fits
    assert found.tokens_per_second is None
    assert summary(found) == "does not fit: CPU needs 401 MB of 350 MB free"


def test_what_would_change_most(five_layers: Path) -> None:
    fitter = made_up_fitter(560 * MB, speeds={})
    types = {"Q4_K_M": 4.89, "Q4_K_S": 4.2, "Q2_K": 3.0}
    found = fitter.fit(read_gguf(five_layers), LoadOptions(context=20_000), types)
    assert found.placement.gpu_layers == 4
    assert found.advice[1:] == ("context 8192: all layers fit",)
    some = made_up_fitter(330 * MB, speeds={}).fit(read_gguf(five_layers), LoadOptions(context=20_000))
    assert some.placement.gpu_layers == 2
    assert some.advice == ("context 8192: 1 more layer",)
    everything = made_up_fitter(GB, speeds={}).fit(read_gguf(five_layers), LoadOptions(context=20_000), types)
    assert everything.advice == ()


def test_memory_that_does_not_hold_the_weights_is_said_as_by_a_load(
    five_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitter, options = made_up_fitter(0, ram=450 * MB), LoadOptions(context=1000)
    monkeypatch.setattr(choices, "memory_limits", lambda: {"machine": 450 * MB})
    found = fitter.fit(read_gguf(five_layers), options)
    assert not found.fits
    assert any("450 MB of memory are available: weights will be read from the disk" in note for note in found.notes)


def test_a_device_that_is_better_left_alone_is_named(five_layers: Path) -> None:
    """The made-up device is a worker; the machine's own memory holds the model, too."""
    speeds = {"GPU0": DeviceSpeed(100 * GB, 0.1, 100 * MB), CPU: DeviceSpeed(20 * GB, 0.0)}
    gguf, options = read_gguf(five_layers), LoadOptions(context=1000)
    found = made_up_fitter(GB, speeds=speeds).fit(gguf, options)
    assert found.placement.is_all
    rate = 20 * GB / sum(read_layers(gguf).weights)
    assert found.advice == (f"without --worker: at most {rate:.3g} tokens per second",)
    near = speeds | {"GPU0": DeviceSpeed(100 * GB, 0.001, 100 * MB)}
    assert made_up_fitter(GB, speeds=near).fit(gguf, options).advice == ()
    # it is needed: alone, the model does not fit
    assert made_up_fitter(GB, ram=300 * MB, speeds=speeds).fit(gguf, options).advice == ()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, five_layers: Path, tmp_path: Path) -> Iterator[Hub]:
    large = tmp_path / "large-Q4_K_M.gguf"
    write_header(large, blocks=2, width=512, feed_forward=1024, heads=8, kv_heads=8, vocabulary=100_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {
        "five/five": {"five-Q4_K_M.gguf": five_layers.read_bytes()},
        "five/large": {large.name: large.read_bytes()},
        "five/bad": {"bad-Q4_K_M.gguf": b"GGUF" + bytes(3_000_000)},
    }
    with serve(Hub(files)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_model_on_the_hub_is_planned_from_its_header(
    server: Hub, five_layers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "five/five", "--json", "-c", "512", "-g", "0", "-j", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == five_layers.stat().st_size
    assert found["devices"][-1]["weights"] == sum(tensor.nbytes for tensor in read_gguf(five_layers).tensors)
    assert [asked for path, asked in server.requests if "/resolve/" in path] == ["bytes=0-1048575"]
    assert library.list_models() == []
    assert not Path(found["path"]).exists()


def test_a_long_header_is_fetched_whole_and_no_more(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_FIRST_BYTES", 1 << 18)
    path = hub.fetch_headers(HubRef("five", "large"), tmp_path)
    whole = read_gguf(tmp_path / "large-Q4_K_M.gguf")
    assert read_gguf(path).tensors == whole.tensors
    assert len(server.requests) == 1 + 3
    monkeypatch.setattr(hub, "_FIRST_BYTES", 1 << 20)
    server.ignore_ranges = True
    other = tmp_path / "other"
    other.mkdir()
    assert read_gguf(hub.fetch_headers(HubRef("five", "large"), other)).tensors == whole.tensors
    with pytest.raises(ModelFileError):
        hub.fetch_headers(HubRef("five", "bad"), other)


def test_a_checkpoint_is_planned_as_what_it_would_become(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here, on the hub from its headers, and converted: the same bytes."""
    source = tiny_checkpoint(tmp_path / "tiny", dtype="F32", num_hidden_layers=3)
    write_tiny_tokenizer(source)
    server.repos["kin/tiny"] = {path.name: path.read_bytes() for path in source.iterdir()}
    server.repos["kin/bin"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}

    def planned(model: str) -> dict[str, Any]:
        assert cli.main(["fit", model, "--json", "-c", "256", "-g", "0", "-j", "1"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {key: found[key] for key in ("bytes", "n_layers")} | {"weights": found["devices"][-1]["weights"]}

    here, there = planned(str(source)), planned("kin/tiny:Q4_K_M")
    assert library.list_models() == []
    whole = sum(len(content) for content in server.repos["kin/tiny"].values())
    shards = [range_ for path, range_ in server.requests if path.endswith(".safetensors")]
    assert len(shards) == 4
    assert all(int(str(asked).rpartition("-")[2]) < whole // 4 for asked in shards)
    assert cli.main(["convert", str(source), "-q", "--no-check"]) == 0
    assert here == there == planned(str(library.list_models()[0].path))
    assert here["n_layers"] == 4
    assert cli.main(["fit", "kin/bin"]) == 1
    assert "handmill pull kin/bin" in capsys.readouterr().err


# A device once registered stays: in a process of its own.
PROGRAM = """
import sys
from runner import rpc
from runner.cli import main
for endpoint in sys.argv[1].split(","):
    rpc.add_server(endpoint)
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.skipif("RPC" not in backends(), reason="this build has no RPC backend")
def test_a_plan_on_devices(starter_model: Path) -> None:
    with rpc_server(memory=2 * GB) as endpoint:
        command = [sys.executable, "-c", PROGRAM, endpoint, "fit", str(starter_model), "--vram", "120M", "-c", "8192"]
        root = Path(__file__).parents[1]
        done = [
            subprocess.run([*command, *more], capture_output=True, text=True, cwd=root, timeout=300)
            for more in (["--json"], [])
        ]
    assert [run.returncode for run in done] == [0, 0], done[0].stderr
    found = json.loads(done[0].stdout)
    assert 0 < found["gpu_layers"] < 31
    device = found["devices"][0]
    assert device["name"] == "RPC0"
    assert device["layers"] == found["gpu_layers"]
    assert 100 << 20 < device["weights"] + device["kv"] + device["compute"] <= 120 << 20
    assert found["tokens_per_second"] > 0
    assert any(line.endswith("all layers fit") or "more layer" in line for line in found["advice"])
    assert "what would change most:" in done[1].stdout


@pytest.mark.skipif("RPC" not in backends(), reason="this build has no RPC backend")
def test_plans_for_machines_that_are_not_there(tmp_path: Path) -> None:
    """llama.cpp plans on loopback devices with the memory of others; nothing of it is taken."""
    shapes: dict[str, dict[str, Any]] = {
        "1B": {"blocks": 16, "width": 2048, "feed_forward": 8192, "heads": 32, "kv_heads": 8},
        "8B": {"blocks": 32, "width": 4096, "feed_forward": 14336, "heads": 32, "kv_heads": 8},
        "30B-A3B": {"blocks": 48, "width": 2048, "feed_forward": 768, "heads": 32, "kv_heads": 4, "experts": 128},
        "70B": {"blocks": 80, "width": 8192, "feed_forward": 28672, "heads": 64, "kv_heads": 8},
        "400B": {"blocks": 62, "width": 6144, "feed_forward": 2560, "heads": 48, "kv_heads": 8, "experts": 128},
    }
    models = {
        name: write_header(tmp_path / f"{name}.gguf", vocabulary=32_000, **shape) for name, shape in shapes.items()
    }
    # free memory of the GPUs; then layers of all, and whether some are in part on the CPU
    expected = {
        ("1B", (6,)): (17, 17, False),
        ("8B", (6,)): (33, 33, False),
        ("8B", (4,)): (24, 33, True),
        ("30B-A3B", (12,)): (49, 49, True),
        ("70B", (12,)): (23, 81, False),
        ("70B", (12, 24)): (69, 81, True),
        ("70B", (128,)): (81, 81, False),
        ("400B", (12,)): (63, 63, True),
        ("400B", (24, 24)): (63, 63, True),
    }
    with rpc_server() as one, rpc_server() as two, planner([one, two]) as asked:
        gpus = [device for device in asked.devices() if device.is_gpu]
        for (name, sizes), (layers, of, in_part) in expected.items():
            machine = [replace(gpu, free=size * GB) for gpu, size in zip(gpus, sizes, strict=False)]
            gguf = read_gguf(models[name])
            plan = asked.place(gguf, machine, Wish(Settings(8192)))
            got = plan.gpu_layers, plan.n_layers, bool(plan.split.on_cpu)
            assert got == (layers, of, in_part), (name, sizes, str(plan))
            assert all(plan.buffers[device.name].total <= device.free for device in machine)


def test_what_crosses_a_network_costs_time(five_layers: Path) -> None:
    """A hidden state there and back, or after the last layer the logits."""
    gguf = read_gguf(five_layers)
    assert bytes_sent(gguf, last=False) == 4 * (1024 + 1024)
    rows = next(tensor.shape[-1] for tensor in gguf.tensors if tensor.name == "token_embd.weight")
    assert bytes_sent(gguf, last=True) == 4 * (1024 + rows)
    assert DeviceSpeed(100.0, 0.5, link_bytes_per_second=10.0).seconds_for(200.0, 30.0) == 2.0 + 0.5 + 3.0
    assert DeviceSpeed(100.0, 0.5).seconds_for(200.0, 30.0) == 2.5

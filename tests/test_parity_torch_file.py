"""What torch itself saves, read without it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from convert.checkpoint import open_checkpoint
from convert.converter import convert_checkpoint
from convert.file_types import file_type
from convert.torch_file import read_torch_file
from models.errors import CheckpointError
from tests.checkpoints import starter_checkpoint, write_json
from tests.peer import need_peer, peer_convert
from tests.torch_files import (
    VALID,
    values,
    written,
)

pytestmark = pytest.mark.parity

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def saved(path: Path, value: object, legacy: bool, **options: Any) -> Path:
    import torch

    torch.save(value, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def bits(value: Any) -> NDArray[Any]:
    """The elements of a torch tensor, as `values` gives them."""
    import torch

    value = value.detach().clone(memory_format=torch.contiguous_format)
    same_width = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
    array: NDArray[Any] = value.view(same_width.get(value.dtype, value.dtype)).numpy()
    return array


@LEGACY
def test_what_torch_saves_is_read(tmp_path: Path, legacy: bool) -> None:
    import torch

    torch.manual_seed(1)
    base = torch.randn(6, 8)
    names = "bfloat16 float16 float32 float64 float8_e4m3fn float8_e5m2 bool int8 int16 int32 int64"
    names += " uint8 uint16 uint32 uint64"
    tensors = {name: torch.randn(3, 5).abs().to(getattr(torch, name)) for name in names.split()}
    tensors |= {
        "base": base,
        "tied": base,
        "rows": base[2:4],
        "columns": base[:, 3:],
        "every other": base[::2, ::3],
        "transposed": base.t(),
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "element": base[5, 7],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "one row of many": base[1:2],
        "parameter": torch.nn.Parameter(base[1] * 2),
        "frozen": torch.nn.Parameter(torch.arange(5), requires_grad=False),
        "名前": torch.ones(2),
    }
    found = {info.name: info for info in read_torch_file(saved(tmp_path / "模型.bin", tensors, legacy))}
    assert list(found) == list(tensors)
    for name, info in found.items():
        expected = bits(tensors[name])
        np.testing.assert_array_equal(values(info), expected, err_msg=name)
        assert info.shape == expected.shape
    assert found["base"].offset == found["tied"].offset
    assert found["transposed"].strides == (1, 8)
    assert found["rows"].strides is None


@LEGACY
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_state_dict_of_a_module(tmp_path: Path, legacy: bool, protocol: int) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Embedding(7, 4)).bfloat16()
    state_dict = module.state_dict()
    path = saved(tmp_path / "x.bin", state_dict, legacy, pickle_protocol=protocol)
    found = {info.name: info for info in read_torch_file(path)}
    assert list(found) == list(state_dict)
    for name, info in found.items():
        np.testing.assert_array_equal(values(info), bits(state_dict[name]))


@LEGACY
def test_what_torch_saves_besides_plain_tensors_is_refused_by_name(tmp_path: Path, legacy: bool) -> None:
    import torch

    a = torch.ones(2, 2)
    for value, message in (
        ({"state_dict": {"a": a}, "epoch": 3}, "holds a dict under 'state_dict'"),
        ([a], "holds a value of type list where a dict of tensors should be"),
        (a, "holds a value of type TensorRef where"),
        ({"a": a.untyped_storage()}, "holds a value of type StorageRef under 'a'"),
        ({"a": a.to_sparse()}, "the global 'torch._utils._rebuild_sparse_tensor'"),
        ({"a": a.to(torch.complex64)}, "the global 'torch.ComplexFloatStorage'"),
        ({"a": a.shape}, "the global 'torch.Size'"),
        ({"a": torch.float32}, "the global 'torch.float32'"),
        ({"a": torch.device("cpu")}, "the global 'torch.device'"),
        ({"a": a.numpy()}, "_reconstruct'"),
        ({"a": torch.empty(2, device="meta")}, "the global 'torch._utils._rebuild_meta_tensor_no_storage'"),
        ({1: a}, "a key that is no text but a value of type int"),
        (torch.nn.Linear(2, 2), "the global 'torch.nn.modules.linear.Linear'"),
        ({"a": torch.zeros(1).expand(5, 5)}, "does not fit its storage of 4 bytes"),
    ):
        with pytest.raises(CheckpointError) as raised:
            read_torch_file(saved(tmp_path / "x.bin", value, legacy))
        assert message in str(raised.value)


def test_our_own_files_are_such_that_torch_reads_them(tmp_path: Path) -> None:
    """Else the tests above would show little."""
    import torch

    for form, data in VALID.items():
        path = written(tmp_path, data)
        found = {info.name: values(info) for info in read_torch_file(path)}
        loaded = torch.load(path, weights_only=True)
        assert list(found) == list(loaded), form
        for name, value in loaded.items():
            np.testing.assert_array_equal(found[name], bits(value))


def test_the_converter_of_llama_cpp_makes_the_same_of_them(tmp_path: Path, starter_model: Path) -> None:
    """It stops at the older form, so that its file of the newer one serves for both."""
    import torch

    need_peer()
    folder = starter_checkpoint(tmp_path / "model", starter_model, blocks=2, shards=2)
    listed = open_checkpoint(folder).tensors.values()
    shards: dict[str, OrderedDict[str, Any]] = {}
    for info in listed:
        tensor = torch.from_numpy(values(info).copy()).view(torch.bfloat16)
        if info.name.endswith("q_proj.weight"):
            tensor = tensor.t().contiguous().t()
        shards.setdefault(f"pytorch_{info.path.stem}.bin", OrderedDict())[info.name] = tensor
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    for legacy in (True, False):
        for name, tensors in shards.items():
            saved(folder / name, tensors, legacy)
        convert_checkpoint(folder, tmp_path / f"ours-{legacy}.gguf", file_type("BF16"), check=False)
    peer_convert(folder, tmp_path / "theirs.gguf", "bf16")
    assert (tmp_path / "ours-True.gguf").read_bytes() == (tmp_path / "ours-False.gguf").read_bytes()
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("ours-True.gguf", "theirs.gguf")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        np.testing.assert_array_equal(tensor.data, theirs[name].data)

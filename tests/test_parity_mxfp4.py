"""gpt-oss with MXFP4 experts, as it is on the hub: its blocks come out as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from convert.converter import convert_checkpoint
from convert.file_types import file_type
from models.gguf_file import read_gguf
from tests.checkpoints import INDEX, edit_json
from tests.family_cases import CASES
from tests.family_checkpoints import make_checkpoint
from tests.peer import need_peer, peer_convert
from tests.test_quantized import Parts, mxfp4, typed, write_typed

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, starter_model: Path) -> Path:
    need_peer()
    folder = tmp_path_factory.mktemp("mxfp4") / "checkpoint"
    make_checkpoint(CASES["gpt-oss"], folder, starter_model)
    infos = open_checkpoint(folder).tensors
    tensors: Parts = {}
    for name, info in infos.items():
        raw = np.fromfile(info.path, np.uint16, info.nbytes // 2, offset=info.offset).reshape(info.shape)
        if name.endswith((".gate_up_proj", ".down_proj")) and ".experts." in name:
            n_experts, n_in, n_out = info.shape
            parts, _ = mxfp4((n_experts, n_out, n_in))
            tensors |= {name + key.removeprefix("experts.down_proj"): part for key, part in parts.items()}
        else:
            tensors[name] = typed(raw, info.dtype)
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    (folder / INDEX).unlink()
    write_typed(folder / "model.safetensors", tensors)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    return folder


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {t.name: (t.type, data[t.offset : t.offset + t.nbytes]) for t in read_gguf(path).tensors}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "MXFP4_MOE"])
def test_experts_stay_as_they_are(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    convert_checkpoint(checkpoint, tmp_path / "ours.gguf", file_type(kind))
    peer_convert(checkpoint, tmp_path / "theirs.gguf", "bf16")
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
    experts = [name for name in theirs if "_exps.weight" in name]
    assert experts
    for name in experts:
        assert ours[name][0] == "MXFP4"
        assert ours[name] == theirs[name], name


def test_who_asks_for_numbers_gets_what_the_blocks_stand_for(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "kept.gguf", file_type("Q8_0"))
    convert_checkpoint(checkpoint, tmp_path / "f32.gguf", file_type("F32"))
    import gguf

    kept, decoded = tensors(tmp_path / "kept.gguf"), tensors(tmp_path / "f32.gguf")
    for name in [name for name in kept if "_exps.weight" in name]:
        blocks = np.frombuffer(kept[name][1], np.uint8).reshape(-1, 17)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
        assert decoded[name][0] == "F32"
        np.testing.assert_array_equal(np.frombuffer(decoded[name][1], np.float32), values.reshape(-1))

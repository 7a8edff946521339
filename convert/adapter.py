"""A LoRA adapter as a GGUF file, which llama.cpp applies to a model while it runs.

The order that a family gives the rows and columns of a matrix, its thin matrices get too. It is found by sending a
matrix of row numbers, and one of column numbers, through the family's passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import read_json
from convert.gguf_writer import TensorEntry, header_bytes, padded
from convert.lora import Adapter, Delta, open_adapter
from convert.metadata import add_general
from convert.output import check_output, whole_file
from convert.pipeline import PlacedTensor, write_tensors
from convert.quantize import TensorType
from convert.tensors import TensorPlan, gguf_names
from models.errors import CheckpointError, UnsupportedError
from models.families import ModelFamily, family_of
from models.families.passes import stack_experts, without_other_parts
from models.hparams import Hparams
from models.text import printable
from models.weights import Index, Weights

_EXACT_NUMBERS = 1 << 24
"""Up to here float32 holds every integer."""


@dataclass(frozen=True)
class AdapterReport:
    """A converted adapter."""

    path: Path
    n_matrices: int
    n_bytes: int


def convert_adapter(
    source: Path, base: Path, output: Path, kind: TensorType, *, force: bool = False, threads: int = 1
) -> AdapterReport:
    """Write the adapter in `source` as a GGUF file for the model that is made of the checkpoint `base`.

    Only the config of `base` is read. Raises CheckpointError, TensorError, UnsupportedError, OutputError.
    """
    check_output(output, 0, force=force)
    adapter = open_adapter(source)
    config = read_json(base / "config.json")
    if config is None:
        raise CheckpointError(f"{base} has no config.json", hint="--base is the checkpoint that the adapter changes.")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{base / 'config.json'} names no architecture")
    family = family_of(names[0], config)
    if adapter.replaced:
        name = next(iter(adapter.replaced))
        raise UnsupportedError(
            f"the adapter replaces {printable(name)!r} as a whole, which a GGUF adapter cannot",
            hint="Fold it into the model: handmill convert ADAPTER --base CHECKPOINT --merge.",
            tensor=name,
        )
    placed, offset = [], 0
    for plan in _plans(adapter, family, family.hparams(config)):
        nbytes = plan.n_rows * kind.row_bytes(plan.row_length) if plan.row_length % kind.block == 0 else 0
        if not nbytes:
            raise UnsupportedError(
                f"rows of {plan.row_length} in {plan.name} do not divide into blocks of {kind.name}",
                hint="Take -t F16 or F32.",
            )
        placed.append(PlacedTensor(plan, kind, kind, offset, nbytes))
        offset += padded(nbytes)
    header = _header(adapter, family, placed)
    with whole_file(output, len(header) + offset, force=force) as partial:
        with partial.open("r+b") as file:
            file.write(header)
        write_tensors(
            placed, [partial], data_start=lambda wait: [len(header)], threads=threads, progress=lambda done: None
        )
    return AdapterReport(output, len(placed) // 2, len(header) + offset)


def _header(adapter: Adapter, family: ModelFamily, placed: list[PlacedTensor]) -> bytes:
    writer = gguf.GGUFWriter(path=None, arch=family.gguf_arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    add_general(writer, adapter.path, {})
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    entries = [
        TensorEntry(tensor.plan.name, tensor.plan.shape[::-1], tensor.kind.id, tensor.nbytes) for tensor in placed
    ]
    return header_bytes(writer.kv_data[0], entries)


def _plans(adapter: Adapter, family: ModelFamily, hparams: Hparams) -> Iterator[TensorPlan]:
    """`NAME.lora_a` and `NAME.lora_b` of each matrix, experts stacked."""
    parts: dict[str, dict[str, Weights]] = {"lora_a": {}, "lora_b": {}}
    for delta in adapter.deltas.values():
        for name, a, b in _in_gguf_order(delta, adapter.alpha, family, hparams):
            parts["lora_a"][name], parts["lora_b"][name] = a, b
    names = gguf_names(family, hparams)
    for part, weights in parts.items():
        for hf_name, matrix in stack_experts(weights, hparams).items():
            name = names(hf_name, matrix)
            yield TensorPlan(f"{name}.{part}", matrix)


def _in_gguf_order(
    delta: Delta, alpha: float, family: ModelFamily, hparams: Hparams
) -> Iterator[tuple[str, Weights, Weights]]:
    """The matrices of the file that one of the checkpoint becomes, as pairs (a, b)."""
    n_rows, n_columns = delta.shape
    if max(n_rows, n_columns) > _EXACT_NUMBERS:
        raise UnsupportedError(f"{printable(delta.name)!r} has {max(n_rows, n_columns):,} rows", tensor=delta.name)
    rows, columns = (
        _through_passes(delta, family, hparams, number)
        for number in (lambda r, c: r[:, None], lambda r, c: c[None, :])
    )
    # llama.cpp scales by alpha / rank; what else there is goes into b
    factor = delta.scale / (alpha / delta.rank)
    b_scaled = delta.b if factor == 1 else delta.b.mapped(lambda values: values * np.float32(factor))
    for name, row_numbers in rows.items():
        column_numbers = columns[name]
        if len(row_numbers.shape) != 2:
            raise _cannot(delta)
        a, b = delta.a, b_scaled
        first_row, first_column = row_numbers.rows(0, 1)[0], row_numbers.read(row_numbers.grid, slice(0, 1))[:, 0]
        if (first_row != first_row[0]).any():  # the family transposes it
            a, b = b.transposed(), a.transposed()
            row_numbers, column_numbers = column_numbers, row_numbers
            first_row, first_column = row_numbers.rows(0, 1)[0], row_numbers.read(row_numbers.grid, slice(0, 1))[:, 0]
        row_order = _numbers(first_column, b.shape[0], delta)
        column_order = _numbers(column_numbers.rows(0, 1)[0], a.shape[1], delta)
        if delta.embedding:  # llama.cpp looks up the row of a token in lora_a
            yield name, b.pick(row_order), a.pick_columns(column_order).transposed()
        else:
            yield name, a.pick_columns(column_order), b.pick(row_order)


def _through_passes(
    delta: Delta, family: ModelFamily, hparams: Hparams, number: Callable[[Index, Index], Index]
) -> Mapping[str, Weights]:
    """What the family makes of a matrix of the shape of `delta` whose elements are numbers of rows or columns."""

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        wanted = np.arange(columns.start, columns.stop)
        numbers = np.broadcast_to(number(rows, wanted), (len(rows), len(wanted)))
        return np.ascontiguousarray(numbers, np.float32)

    tensors: Mapping[str, Weights] = {delta.name: Weights(delta.shape, "F32", delta.name, delta.b.file, read)}
    for step in (without_other_parts, *family.passes):
        tensors = step(tensors, hparams)
    return tensors


def _numbers(values: NDArray[np.float32], n: int, delta: Delta) -> Index:
    order = values.astype(np.int64)
    if (order != values).any() or order.min() < 0 or order.max() >= n:
        raise _cannot(delta)
    return order


def _cannot(delta: Delta) -> UnsupportedError:
    return UnsupportedError(
        f"llama.cpp computes with other values than those of {printable(delta.name)!r}, which an adapter beside the "
        "model cannot follow",
        hint="Fold it into the model: handmill convert ADAPTER --base CHECKPOINT --merge.",
        tensor=delta.name,
    )

"""A Hugging Face checkpoint to a quantized GGUF file, in one pass.

    checkpoint -> family -> (tensor plan, metadata, vocabulary) -> tensor types -> header -> rows -> check -> file

`plan_conversion` does all that needs no weights; `convert_checkpoint` carries the plan out. The header comes first,
since the types fix every offset; then rows stream from shard to file through threads that encode them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convert import metadata, quantize
from convert.check import CHECK_TEXTS, LIMIT_TEXTS, check_computation, check_vocabulary
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.file_types import DEFAULT, FileType
from convert.gguf_writer import TensorEntry, header_bytes, padded
from convert.output import check_output, flush, translated, whole_file
from convert.pipeline import PlacedTensor, write_tensors
from convert.tensors import TensorPlan, plan_tensors
from convert.tokenizer import Vocabulary, read_vocabulary
from models.errors import CheckpointError
from models.families import ModelFamily, family_of
from models.hparams import Hparams

Stage = Literal["planning", "encoding", "checking"]
Progress = Callable[[Stage, int, int], None]
"""Told the stage, the bytes of the checkpoint that are done, and all of them."""


@dataclass(frozen=True)
class TypeTotal:
    """How much of a file has one tensor type."""

    kind: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class ConversionPlan:
    """All that is known before a weight is read. Sizes in bytes."""

    checkpoint: Checkpoint
    family: ModelFamily
    file_type: FileType
    tensors: tuple[PlacedTensor, ...]
    header: bytes
    expected_ids: dict[str, list[int]]
    known_limits: frozenset[str]
    warnings: tuple[str, ...]

    @property
    def n_vocab(self) -> int:
        return next(tensor.plan.shape[0] for tensor in self.tensors if tensor.plan.name == "token_embd.weight")

    @property
    def source_bytes(self) -> int:
        return sum(tensor.plan.source.nbytes for tensor in self.tensors if tensor.plan.source is not None)

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(padded(tensor.nbytes) for tensor in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(tensor.plan.n_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return sum(tensor.nbytes for tensor in self.tensors) * 8 / self.n_weights

    @property
    def totals(self) -> list[TypeTotal]:
        """By tensor type, the largest share first."""
        by_kind: dict[str, list[int]] = {}
        for tensor in self.tensors:
            by_kind.setdefault(tensor.kind.name, []).append(tensor.nbytes)
        totals = [TypeTotal(kind, len(sizes), sum(sizes)) for kind, sizes in by_kind.items()]
        return sorted(totals, key=lambda total: -total.n_bytes)


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion."""

    path: Path
    plan: ConversionPlan
    seconds: float
    checked: bool
    warnings: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: Path,
    output: Path,
    file_type: FileType = DEFAULT,
    *,
    force: bool = False,
    check: bool = True,
    threads: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ConversionReport:
    """Convert the checkpoint directory `source` to the GGUF file `output`, which appears whole or not at all.

    Raises the errors of `plan_conversion`, TensorError, OutputError, ConversionFailed, CheckFailed.
    """
    started = time.monotonic()
    threads = threads or available_cores()
    check_output(output, 0, force=force)
    progress("planning", 0, 1)
    plan = plan_conversion(source, file_type)
    warnings = list(plan.warnings)
    with whole_file(output, plan.n_bytes, force=force) as partial:
        with translated(output), partial.open("r+b") as file:
            file.write(plan.header)
        with ThreadPoolExecutor(1) as beside:
            # The vocabulary is complete now: it is checked while the weights are encoded, and ends that if it fails.
            checked = beside.submit(check_vocabulary, partial, plan.expected_ids, plan.known_limits) if check else None

            def encoded(n_bytes: int) -> None:
                if checked is not None and checked.done():
                    checked.result()
                progress("encoding", n_bytes, plan.source_bytes)

            write_tensors(plan.tensors, partial, threads=threads, progress=encoded)
            warnings += checked.result() if checked is not None else []
            beside.submit(flush, partial)
            if check:
                progress("checking", plan.source_bytes, plan.source_bytes)
                check_computation(
                    partial,
                    plan.expected_ids,
                    architecture=plan.family.gguf_arch,
                    n_vocab=plan.n_vocab,
                    threads=threads,
                )
    return ConversionReport(output, plan, time.monotonic() - started, check, warnings)


def plan_conversion(source: Path, file_type: FileType = DEFAULT) -> ConversionPlan:
    """Read configs, headers and tokenizer; let llama.cpp choose the types and look the model over.

    Raises CheckpointError, UnsupportedError, TensorError, TokenizerError, ConversionFailed.
    """
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.architecture)
    hparams = Hparams(checkpoint.config, family.defaults)
    hparams.refuse_unknown_computation()
    tensors = plan_tensors(checkpoint, family, hparams)
    placed = _place(tensors, checkpoint, family, hparams, file_type)
    vocabulary = read_vocabulary(source, hparams.integer("vocab_size"), (*CHECK_TEXTS, *LIMIT_TEXTS))
    header = _header(placed, checkpoint, family, hparams, file_type.id, vocabulary)
    expected_ids, notes = vocabulary.expected_ids, _vocabulary_notes(vocabulary)
    limits = frozenset(text for text in expected_ids if vocabulary.prefix_if_absent and text.startswith(" "))
    del vocabulary
    _release_memory()
    offset = len(header)
    at = []
    for tensor in placed:
        at.append(PlacedTensor(tensor.plan, tensor.kind, tensor.carrier, offset, tensor.nbytes))
        offset += padded(tensor.nbytes)
    return ConversionPlan(
        checkpoint, family, file_type, tuple(at), header, expected_ids, limits.union(LIMIT_TEXTS), notes
    )


def available_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _place(
    tensors: Sequence[TensorPlan],
    checkpoint: Checkpoint,
    family: ModelFamily,
    hparams: Hparams,
    file_type: FileType,
) -> list[PlacedTensor]:
    """Ask llama.cpp for the type and order of the tensors, on a hollow file of the types it would quantize from."""
    carrier = _carrier(checkpoint)
    unquantized = [
        PlacedTensor(plan, kind, kind, 0, plan.n_rows * kind.row_bytes(plan.row_length))
        for plan in tensors
        for kind in [quantize.F32 if plan.keep_f32 else carrier]
    ]
    header = _header(unquantized, checkpoint, family, hparams, 0, None)
    with quantize.hollow_file(header, sum(padded(tensor.nbytes) for tensor in unquantized)) as hollow:
        sources = {plan.name: plan.source.name for plan in tensors if plan.source is not None}
        quantize.check_structure(hollow, sources)
        types = quantize.choose_tensor_types(hollow, file_type, len(tensors))
    by_name = {tensor.plan.name: tensor for tensor in unquantized}
    placed = []
    for name, kind in types.items():
        plan, before = by_name[name].plan, by_name[name].carrier
        placed.append(PlacedTensor(plan, kind, before, 0, plan.n_rows * kind.row_bytes(plan.row_length)))
    return placed


def _carrier(checkpoint: Checkpoint) -> quantize.TensorType:
    """What llama.cpp's converter would store matrices in: the type of the first that is BF16 or F16, else F32."""
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) > 1 and tensor.dtype != "F32":
            return quantize.tensor_type(tensor.dtype)
    return quantize.F32


def _header(
    tensors: Sequence[PlacedTensor],
    checkpoint: Checkpoint,
    family: ModelFamily,
    hparams: Hparams,
    file_type_id: int,
    vocabulary: Vocabulary | None,
) -> bytes:
    keys = metadata.build_metadata(
        checkpoint,
        family,
        hparams,
        n_parameters=sum(tensor.plan.n_weights for tensor in tensors),
        file_type=file_type_id,
        vocabulary=vocabulary,
    )
    entries = [
        TensorEntry(tensor.plan.name, tensor.plan.shape[::-1], tensor.kind.id, tensor.nbytes) for tensor in tensors
    ]
    try:
        return header_bytes(keys, entries)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise CheckpointError(f"the metadata of {checkpoint.path} cannot be stored: {error}") from error


def _vocabulary_notes(vocabulary: Vocabulary) -> tuple[str, ...]:
    if vocabulary.special.chat_template is None:
        return ("the checkpoint has no chat template: `handmill run` continues text, `handmill chat` cannot talk",)
    return ()


def _release_memory() -> None:
    """Give the tokenizer's memory back to the system before encoding begins."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

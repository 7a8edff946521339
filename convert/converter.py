"""A Hugging Face checkpoint to a quantized GGUF file, in one pass.

    checkpoint -> family -> (tensor plan, metadata, vocabulary) -> tensor types -> header -> rows -> check -> file

`plan_conversion` does all that needs no weights; `convert_checkpoint` carries the plan out. The types fix every
offset; then rows stream from shard to file through threads that encode them, while a process reads the tokenizer.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convert import metadata, quantize
from convert.check import CHECK_TEXTS, LIMIT_TEXTS, check_computation, check_vocabulary
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.file_types import DEFAULT, FileType
from convert.gguf_writer import TensorEntry, header_bytes, padded
from convert.lora import merged, open_adapter
from convert.output import check_output, flush, translated, whole_file
from convert.pipeline import PlacedTensor, write_tensors
from convert.reading import reading_vocabulary
from convert.stored import stored
from convert.tensors import TensorPlan, plan_tensors
from convert.vocabulary import Vocabulary
from models.errors import CheckpointError
from models.families import ModelFamily, Tensors, family_of
from models.hparams import Hparams

_WAIT_SECONDS = 0.1
_TEXTS = (*CHECK_TEXTS, *LIMIT_TEXTS)

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
    ignored_fields: Collection[str] = (),
    adapter: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ConversionReport:
    """Convert the checkpoint directory `source` to the GGUF file `output`, which appears whole or not at all.

    `ignored_fields` of config.json may have any value; a LoRA `adapter` is folded in. Raises the errors of
    `plan_conversion`, TensorError, OutputError, ConversionFailed, CheckFailed.
    """
    started = time.monotonic()
    threads = threads or available_cores()
    check_output(output, 0, force=force)
    progress("planning", 0, 1)
    model = _open_model(source, ignored_fields, adapter)
    # The process that reads the tokenizer ends first, so that nothing waits for it when something else went wrong.
    with (
        ThreadPoolExecutor(1) as beside,
        reading_vocabulary(source, model.n_vocab, _TEXTS, model.family.vocabulary) as vocabulary,
    ):
        tensors = _place(model, file_type)
        n_data = sum(padded(tensor.nbytes) for tensor in tensors)
        source_bytes = model.checkpoint.n_bytes
        all_weights = sum(tensor.plan.n_weights for tensor in tensors)
        with whole_file(output, n_data, force=force) as partial:
            planned = beside.submit(lambda: _write_header(_finish(model, file_type, tensors, vocabulary()), partial))
            # While the weights are encoded the vocabulary is checked, which ends the run at once if it fails.
            checked = beside.submit(lambda: _check_vocabulary(planned.result(), partial)) if check else None

            def encoded(n_weights: int) -> None:
                for future in (planned, checked):
                    if future is not None and future.done():
                        future.result()
                progress("encoding", source_bytes * n_weights // all_weights, source_bytes)

            def data_start(wait: bool) -> list[int] | None:
                try:
                    return [len(planned.result(_WAIT_SECONDS if wait else 0).header)]
                except TimeoutError:
                    return None

            write_tensors(tensors, [partial], data_start=data_start, threads=threads, progress=encoded)
            plan = planned.result()
            warnings = [*plan.warnings, *(checked.result() if checked is not None else ())]
            beside.submit(flush, partial)
            if check:
                progress("checking", source_bytes, source_bytes)
                check_computation(
                    partial,
                    plan.expected_ids,
                    architecture=model.family.gguf_arch,
                    n_vocab=model.n_vocab,
                    threads=threads,
                )
    return ConversionReport(output, plan, time.monotonic() - started, check, warnings)


def plan_conversion(
    source: Path,
    file_type: FileType = DEFAULT,
    *,
    ignored_fields: Collection[str] = (),
    adapter: Path | None = None,
) -> ConversionPlan:
    """Read configs, headers and tokenizer; let llama.cpp choose the types and look the model over.

    Raises CheckpointError, UnsupportedError, TensorError, TokenizerError, ConversionFailed.
    """
    model = _open_model(source, ignored_fields, adapter)
    with reading_vocabulary(source, model.n_vocab, _TEXTS, model.family.vocabulary) as vocabulary:
        return _finish(model, file_type, _place(model, file_type), vocabulary())


@dataclass(frozen=True)
class _Model:
    """What the configs and the shards' headers tell."""

    checkpoint: Checkpoint
    family: ModelFamily
    hparams: Hparams
    tensors: Sequence[TensorPlan]
    ignored_fields: frozenset[str]

    @property
    def n_vocab(self) -> int:
        return self.hparams.integer("vocab_size")


def _open_model(source: Path, ignored_fields: Collection[str], adapter: Path | None) -> _Model:
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.architecture, checkpoint.config)
    tensors: Tensors = {name: stored(info) for name, info in checkpoint.tensors.items()}
    if adapter is not None:
        tensors = merged(tensors, open_adapter(adapter))
    hparams = family.hparams(checkpoint.config, tensors)
    hparams.refuse_quantized()
    hparams.require(family.requires)
    return _Model(checkpoint, family, hparams, plan_tensors(tensors, family, hparams), frozenset(ignored_fields))


def _finish(
    model: _Model, file_type: FileType, tensors: Sequence[PlacedTensor], vocabulary: Vocabulary
) -> ConversionPlan:
    expected = vocabulary.expected_ids
    limits = {text for text in expected if vocabulary.prefix_if_absent and text.startswith(" ")}
    return ConversionPlan(
        model.checkpoint,
        model.family,
        file_type,
        tuple(tensors),
        _header(tensors, model, file_type.id, vocabulary),
        expected,
        frozenset(limits.union(LIMIT_TEXTS)),
        tuple(_notes(model, vocabulary)),
    )


def _write_header(plan: ConversionPlan, partial: Path) -> ConversionPlan:
    with translated(partial), partial.open("r+b") as file:
        file.write(plan.header)
        file.truncate(plan.n_bytes)
    return plan


def _check_vocabulary(plan: ConversionPlan, partial: Path) -> list[str]:
    return check_vocabulary(partial, plan.expected_ids, plan.known_limits)


def available_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _place(model: _Model, file_type: FileType) -> list[PlacedTensor]:
    """Ask llama.cpp for the type and order of the tensors, on a hollow file of the types it would quantize from."""
    # llama.cpp leaves a few matrices in the type they come in: who asks for F32 gets F32
    carrier = quantize.F32 if file_type.name == "F32" else _carrier(model.checkpoint)
    carriers = {plan.name: quantize.F32 if plan.keep_f32 else carrier for plan in model.tensors}
    unquantized = _in_order((plan, carriers[plan.name], carriers[plan.name]) for plan in model.tensors)
    header = _header(unquantized, model, 0, None)
    model.hparams.refuse_unread((*model.family.ignored, *model.ignored_fields))
    with quantize.hollow_file(header, sum(padded(tensor.nbytes) for tensor in unquantized)) as hollow:
        sources = {plan.name: plan.weights.name for plan in model.tensors}
        quantize.check_structure(hollow, sources)
        types = quantize.choose_tensor_types(hollow, file_type, len(unquantized))
    plans = {plan.name: plan for plan in model.tensors}
    return _in_order((plans[name], kind, carriers[name]) for name, kind in types.items())


def _in_order(
    tensors: Iterable[tuple[TensorPlan, quantize.TensorType, quantize.TensorType]],
) -> list[PlacedTensor]:
    """Tensors with their types and carriers, one after the other."""
    placed, offset = [], 0
    for plan, kind, carrier in tensors:
        nbytes = plan.n_rows * kind.row_bytes(plan.row_length)
        placed.append(PlacedTensor(plan, kind, carrier, offset, nbytes))
        offset += padded(nbytes)
    return placed


def _carrier(checkpoint: Checkpoint) -> quantize.TensorType:
    """What llama.cpp's converter would store matrices in: the type of the first that is BF16 or F16, else F32."""
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) > 1 and tensor.dtype in ("BF16", "F16"):
            return quantize.tensor_type(tensor.dtype)
    return quantize.F32


def _header(tensors: Sequence[PlacedTensor], model: _Model, file_type_id: int, vocabulary: Vocabulary | None) -> bytes:
    keys = metadata.build_metadata(
        model.checkpoint,
        model.family,
        model.hparams,
        shapes={tensor.plan.name: tensor.plan.shape for tensor in tensors},
        file_type=file_type_id,
        vocabulary=vocabulary,
    )
    entries = [
        TensorEntry(tensor.plan.name, tensor.plan.shape[::-1], tensor.kind.id, tensor.nbytes) for tensor in tensors
    ]
    try:
        return header_bytes(keys, entries)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise CheckpointError(f"the metadata of {model.checkpoint.path} cannot be stored: {error}") from error


def _notes(model: _Model, vocabulary: Vocabulary) -> Iterator[str]:
    """What a person should know of the file, though nothing is wrong with it."""
    yield from vocabulary.notes
    if note := model.family.note(model.hparams):
        yield note
    if vocabulary.special.chat_template is None:
        yield "the checkpoint has no chat template: `handmill run` continues text, `handmill chat` cannot talk"
    window = model.hparams.get("sliding_window") if "sliding_window" in model.family.ignored else None
    if isinstance(window, int) and not model.hparams.has("use_sliding_window"):
        yield (
            f"the model looks back {window:,} tokens at most, which llama.cpp does not compute for this architecture: "
            "beyond that its answers may differ"
        )
    if model.hparams.rope.type == "dynamic":
        yield "the rope scaling is dynamic: beyond the trained context, where it would begin, answers may differ"

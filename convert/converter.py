"""A Hugging Face checkpoint to a quantized GGUF file, in one pass.

    checkpoint -> family -> (tensor plan, metadata, vocabulary) -> tensor types -> header -> rows -> check -> file

`plan_conversion` does all that needs no weights; `convert_checkpoint` carries the plan out. The types fix every
offset; then rows stream from shard to file through threads that encode them. A second process lets llama.cpp look the
model over, reads the tokenizer meanwhile, and checks the file: what it does not survive is a named error.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert import metadata, quantize
from convert.check import CHECK_TEXTS, LIMIT_TEXTS, check_apart, check_computation, check_vocabulary
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.file_types import DEFAULT, FileType
from convert.lora import merged, open_adapter
from convert.output import check_outputs, flush, whole_files
from convert.pipeline import PlacedTensor, available_cores, write_tensors
from convert.placement import (
    ConversionReport,
    FilePlan,
    Metadata,
    Progress,
    choose_types,
    data_bytes,
    in_order,
    part_headers,
    part_paths,
    write_headers,
)
from convert.quantized import decoded
from convert.reading import vocabulary_of
from convert.tensors import TensorPlan, plan_tensors
from convert.vocabulary import Vocabulary
from models.errors import CheckpointError
from models.families import ModelFamily, family_of
from models.hparams import Hparams
from models.isolated import Isolated, isolation
from models.native import library

_WAIT_SECONDS = 0.1
_TEXTS = (*CHECK_TEXTS, *LIMIT_TEXTS)


@dataclass(frozen=True)
class ConversionPlan(FilePlan):
    """The plan of a file, and what the checkpoint says of it."""

    checkpoint: Checkpoint
    family: ModelFamily
    expected_ids: dict[str, list[int]]
    known_limits: frozenset[str]
    warnings: tuple[str, ...]


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
    split_size: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ConversionReport:
    """Convert the checkpoint directory `source` to the GGUF file `output`, which appears whole or not at all.

    `ignored_fields` of config.json may have any value; a LoRA `adapter` is folded in; with a `split_size` in bytes
    the file comes in parts named after `output`. Raises UsageError (a tensor is larger than a part), the errors of
    `plan_conversion`, TensorError, OutputError, ConversionFailed, CheckFailed.
    """
    started = time.monotonic()
    threads = threads or available_cores()
    check_outputs(part_paths(output, (), split_size), 0, force=force)
    progress("planning", 0, 1)
    # The other process ends first, so that nothing waits for it when something else went wrong.
    with ThreadPoolExecutor(1) as beside, _isolation() as isolated:
        beside.submit(library)  # takes a moment, in which the headers are read
        model = _open_model(source, ignored_fields, adapter)
        tensors = _place(model, file_type, split_size, isolated)
        paths = part_paths(output, tensors, split_size)
        source_bytes = model.checkpoint.n_bytes
        all_weights = sum(tensor.plan.n_weights for tensor in tensors)
        with whole_files(paths, data_bytes(tensors), force=force) as partials:

            def write_plan() -> ConversionPlan:
                plan = _finish(model, file_type, tensors, _vocabulary(model, isolated), split_size)
                write_headers(plan, partials)
                return plan

            # While the weights are encoded the vocabulary is checked, which ends the run at once if it fails.
            planned = beside.submit(write_plan)

            def check_ids() -> list[str]:
                plan = planned.result()
                return check_apart(isolated, check_vocabulary, partials[0], plan.expected_ids, plan.known_limits)

            checked = beside.submit(check_ids) if check else None

            def encoded(n_weights: int) -> None:
                for future in (planned, checked):
                    if future is not None and future.done():
                        future.result()
                progress("encoding", source_bytes * n_weights // all_weights, source_bytes)

            def data_start(wait: bool) -> list[int] | None:
                try:
                    return [len(header) for header in planned.result(_WAIT_SECONDS if wait else 0).headers]
                except TimeoutError:
                    return None

            write_tensors(tensors, partials, data_start=data_start, threads=threads, progress=encoded)
            plan = planned.result()
            warnings = [*plan.warnings, *(checked.result() if checked is not None else ())]
            for partial in partials:
                beside.submit(flush, partial)
            if check:
                progress("checking", source_bytes, source_bytes)
                asked = (plan.expected_ids, model.family.gguf_arch, model.n_vocab, threads)
                check_apart(isolated, check_computation, partials[0], *asked)
    return ConversionReport(paths[0], tuple(paths), plan, time.monotonic() - started, check, warnings)


def plan_conversion(
    source: Path,
    file_type: FileType = DEFAULT,
    *,
    ignored_fields: Collection[str] = (),
    adapter: Path | None = None,
    split_size: int | None = None,
) -> ConversionPlan:
    """Read configs, headers and tokenizer; let llama.cpp choose the types and look the model over.

    Raises CheckpointError, UnsupportedError, TensorError, TokenizerError, ConversionFailed, UsageError.
    """
    with _isolation() as isolated:
        model = _open_model(source, ignored_fields, adapter)
        tensors = _place(model, file_type, split_size, isolated)
        return _finish(model, file_type, tensors, _vocabulary(model, isolated), split_size)


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


def _isolation() -> AbstractContextManager[Isolated]:
    return isolation("convert.check", "convert.quantize", "convert.reading")


def _open_model(source: Path, ignored_fields: Collection[str], adapter: Path | None) -> _Model:
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.architecture, checkpoint.config)
    tensors = decoded(checkpoint.tensors, checkpoint.config)
    if adapter is not None:
        tensors = merged(tensors, open_adapter(adapter))
    hparams = family.hparams(checkpoint.config, tensors)
    hparams.require(family.requires, ignored_fields)
    return _Model(checkpoint, family, hparams, plan_tensors(tensors, family, hparams), frozenset(ignored_fields))


def _finish(
    model: _Model,
    file_type: FileType,
    tensors: Sequence[PlacedTensor],
    vocabulary: Vocabulary,
    split_size: int | None,
) -> ConversionPlan:
    expected = vocabulary.expected_ids
    limits = {text for text in expected if vocabulary.prefix_if_absent and text.startswith(" ")}
    keys = _metadata(tensors, model, file_type.id, vocabulary)
    with _storable(model):
        headers = part_headers(tensors, keys, split_size)
    return ConversionPlan(
        file_type,
        tuple(tensors),
        headers,
        model.checkpoint.n_bytes,
        model.checkpoint,
        model.family,
        expected,
        frozenset(limits.union(LIMIT_TEXTS)),
        tuple(_notes(model, vocabulary)),
    )


def _vocabulary(model: _Model, isolated: Isolated) -> Vocabulary:
    return vocabulary_of(isolated, model.checkpoint.path, model.n_vocab, _TEXTS, model.family.vocabulary)


def _place(model: _Model, file_type: FileType, split_size: int | None, isolated: Isolated) -> list[PlacedTensor]:
    """Ask llama.cpp for the type and order of the tensors, of the types that it would quantize from."""
    # llama.cpp leaves a few matrices in the type they come in: who asks for F32 gets F32
    carrier = quantize.F32 if file_type.name == "F32" else _carrier(model.checkpoint)
    carriers = {plan.name: quantize.F32 if plan.keep_f32 else carrier for plan in model.tensors}
    plans = {plan.name: plan for plan in model.tensors}
    unquantized = in_order(PlacedTensor(plan, carriers[name], carriers[name]) for name, plan in plans.items())
    keys = _metadata(unquantized, model, 0, None)
    model.hparams.refuse_unread((*model.family.ignored, *model.ignored_fields))
    with _storable(model):
        types = choose_types(model.checkpoint.path, unquantized, keys, file_type, isolated)
    return in_order(
        (PlacedTensor(plans[name], _kept_or(kind, plans[name]), carriers[name]) for name, kind in types.items()),
        split_size,
    )


def _kept_or(kind: quantize.TensorType, plan: TensorPlan) -> quantize.TensorType:
    """The type of a tensor: that in which it is encoded already, if any, before any other that rounds."""
    if plan.weights.packed is None or kind in (quantize.F32, quantize.F16, quantize.BF16):
        return kind
    return quantize.tensor_type(plan.weights.packed.type)


def _carrier(checkpoint: Checkpoint) -> quantize.TensorType:
    """What llama.cpp's converter would store matrices in: the type of the first that is BF16 or F16, else F32."""
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) > 1 and tensor.dtype in ("BF16", "F16"):
            return quantize.tensor_type(tensor.dtype)
    return quantize.F32


def _metadata(
    tensors: Sequence[PlacedTensor], model: _Model, file_type_id: int, vocabulary: Vocabulary | None
) -> Metadata:
    return metadata.build_metadata(
        model.checkpoint,
        model.family,
        model.hparams,
        shapes={tensor.plan.name: tensor.plan.shape for tensor in tensors},
        file_type=file_type_id,
        vocabulary=vocabulary,
    )


@contextmanager
def _storable(model: _Model) -> Iterator[None]:
    try:
        yield
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

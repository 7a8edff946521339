"""Loading a model: onto a GPU where one takes it, with less of it where not, and saying what happened."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from models import native
from models.errors import LoadError
from models.gguf_file import GgufFile
from models.gguf_parts import check_model_file
from models.library import home
from models.native import Vocabulary
from runner import devices, placement, rpc
from runner.devices import Device
from runner.engine.adapters import apply_adapters
from runner.engine.choices import (
    SPARE_SHARE,
    choose_context,
    choose_window,
    holds_weights,
    may_lack_memory,
    rollbacks,
    spare_beside,
    spare_memory,
    wish_of,
)
from runner.engine.context import Context
from runner.engine.context_params import ContextOptions
from runner.engine.draft_model import DraftModel
from runner.engine.lookup import Lookup
from runner.engine.model_params import model_params
from runner.engine.prediction_head import PredictionHead, has_prediction_head
from runner.engine.protocol import LoadOptions, LoadProgress
from runner.engine.speculation import BatchSeconds, Speculation
from runner.engine.state_files import DEFAULT_LIMIT, StateFiles, model_key
from runner.engine.threads import default_threads
from runner.placement import Placement, Split
from runner.placing import place_with_room_to_spare, place_without_asking
from runner.planner import planner

_MOST_BRANCH_BYTES, _BRANCH_BYTES_UNKNOWN = 2 << 30, 256 << 20
_BATCH_SLOPE_CPU, _BATCH_SLOPE_GPU = 0.5, 0.1
"""How much longer each further token of a small batch takes than one alone, until that is measured."""
_CPU_FAILURE = re.compile(r"allocate CPU|cpu_buffer_type_alloc_buffer")
_MEMORY_FAILURE = ("unable to allocate", "failed to allocate", "out of memory", "failed to create context")


@dataclass
class Loaded:
    """A model in memory and what was decided on the way. Owns `model`; `context` owns itself."""

    gguf: GgufFile
    model: Any
    context: Context
    vocabulary: Vocabulary
    metadata: dict[str, str]
    gpu_layers: int
    n_layers: int
    device: str
    device_names: tuple[str, ...]
    """Of those that layers were placed on."""
    seconds: float
    notes: tuple[str, ...]
    branch_bytes: int
    """What memories kept aside may take."""
    states: StateFiles | None
    speculation: Speculation | None


def load_file(path: Path, options: LoadOptions, progress: LoadProgress | None) -> Loaded:
    """Load `path` as `options` say. Raises ModelFileError, LoadError, UsageError.

    Ctrl-C is heard while it loads, and stops it.
    """
    started = time.perf_counter()
    gguf = check_model_file(path)
    left_out = rpc.add_workers(options.workers) if options.gpu_layers != 0 else []
    spare = spare_memory(gguf)
    offload = options.gpu_layers != 0 and devices.has_offload_device()
    n_ctx, notes = choose_context(gguf, options, offload=offload)
    notes = [*left_out, *notes]
    threads = options.threads or default_threads()
    native.set_verbose(options.verbose)

    plan, available = _plan(gguf, n_ctx, options, notes)
    repack = holds_weights(gguf, _with_bytes(gguf, plan, options), notes) and options.repack
    split, n_ctx, kv_types = plan.split, plan.settings.n_ctx, plan.settings.kv_types
    beside = spare_beside(gguf, plan, available, wish_of(n_ctx, options))
    whole_window, said = choose_window(gguf, n_ctx, kv_types, beside)
    notes += said
    # Copies of a state, and a head of the model's own, are for memory that no layer needs.
    spares = not plan.gpu_layers or plan.is_all
    settings = ContextOptions(
        n_ctx=n_ctx,
        threads=threads,
        batch_threads=options.batch_threads or threads,
        batch=plan.settings.batch,
        flash_attention=options.flash_attention,
        type_k=placement.KV_TYPES[kv_types[0]][0],
        type_v=placement.KV_TYPES[kv_types[1]][0],
        whole_window=whole_window,
        rollback=rollbacks(gguf, beside) if spares and (options.speculate or options.draft) else 0,
    )

    head = spares and options.speculate and options.draft is None and has_prediction_head(gguf)
    remaining = placement.fewer_layers(split.gpu_layers)
    while True:
        try:
            model, context = _attempt(path, split, settings, options, progress, head=head, repack=repack)
            break
        except LoadError as error:
            if not _is_memory_failure(error):
                raise
            if settings.rollback or settings.whole_window or head:
                settings, head = replace(settings, rollback=0, whole_window=False), False
                notes.append("there is no memory for what only saves time (guesses, a whole window); tried without")
                continue
            if repack and _CPU_FAILURE.search(_said(error)):
                repack = False
                notes.append("there is no memory for weights in the layout that the CPU computes with; tried without")
                continue
            if (fewer := next(remaining, None)) is None:
                raise
            where = f"{fewer} on the GPU" if fewer else "the CPU alone"
            notes.append(f"the GPU has no memory for {split.gpu_layers} layers; tried again with {where}")
            split = plan.split.fewer(fewer)
    layers = split.gpu_layers
    try:
        vocabulary = Vocabulary(native.library().llama_model_get_vocab(model))
        metadata = native.model_metadata(model)
        own = partial(PredictionHead, model, context, settings) if head else None
        speculation = _speculation(options, context, vocabulary, layers, own)
    except BaseException:
        context.close()
        native.library().llama_model_free(model)
        raise
    used = [device for device in available if dict(split.layers).get(device.name)]
    return Loaded(
        gguf=gguf,
        model=model,
        context=context,
        vocabulary=vocabulary,
        metadata=metadata,
        gpu_layers=layers,
        n_layers=plan.n_layers,
        device=" + ".join(f"{device.name} ({device.description})" for device in used) or "CPU",
        device_names=tuple(device.name for device in used),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
        branch_bytes=_BRANCH_BYTES_UNKNOWN if spare is None else min(_MOST_BRANCH_BYTES, spare // SPARE_SHARE),
        states=_states(path, replace(options, repack=repack), settings),
        speculation=speculation,
    )


def _plan(gguf: GgufFile, n_ctx: int, options: LoadOptions, notes: list[str]) -> tuple[Placement, Sequence[Device]]:
    """Where the layers go, and of which devices. One that is lost meanwhile costs a note, and the CPU computes."""
    wish = wish_of(n_ctx, options)
    if options.gpu_layers == 0:
        return place_without_asking(gguf, [], wish), []
    if not devices.has_offload_device():
        if not options.workers:
            notes.append(devices.why_no_gpu())
        return place_without_asking(gguf, [], wish), []
    if options.gpu_layers != "auto":
        available = devices.offload_devices()
        return place_without_asking(gguf, available, wish), available
    if not rpc.endpoints():
        available = devices.offload_devices()
        if spacious := place_with_room_to_spare(gguf, available, wish):
            return spacious, available
    try:
        with planner() as asked:
            found = devices.offload_devices(asked.devices())
            available = asked.in_order(gguf, found, options.threads or default_threads())
            plan = asked.place(gguf, available, wish, repack=options.repack)
    except LoadError as error:
        if not error.facts.get("lost"):
            raise
        notes.append(f"no GPU is used: {error}")
        return place_without_asking(gguf, [], wish), []
    notes += plan.notes
    if not plan.is_all:
        notes.append(str(plan))
    return plan, available


def _with_bytes(gguf: GgufFile, plan: Placement, options: LoadOptions) -> Placement:
    """The plan with llama.cpp's bytes, where the machine's own memory may be too small for its part."""
    if plan.buffers or not may_lack_memory(gguf, plan):
        return plan
    with suppress(LoadError), planner() as asked:  # the load itself will say what is wrong
        return replace(plan, buffers=asked.account(gguf.path, plan.split, plan.settings, repack=options.repack))
    return plan


def _states(path: Path, options: LoadOptions, settings: ContextOptions) -> StateFiles | None:
    limit = DEFAULT_LIMIT if options.cache is None else options.cache
    if limit == 0:
        return None
    facts = (settings.type_k, settings.type_v, settings.whole_window, options.repack)

    def key() -> str:
        from importlib.metadata import version

        release = version("llama-cpp-python")
        return model_key(path, [release, *facts, *((model_key(lora, ()), scale) for lora, scale in options.loras)])

    return StateFiles(home() / "states", key, limit)


def _speculation(
    options: LoadOptions,
    context: Context,
    vocabulary: Vocabulary,
    gpu_layers: int,
    head: Callable[[], PredictionHead] | None,
) -> Speculation | None:
    """Guessing what comes next, where a wrong guess can be taken back: by the model's own `head`, if it has one."""
    if not context.most_drafted:
        if options.draft is not None:
            raise LoadError("--draft is for models whose memory can be cut, and this one's cannot: it is recurrent")
        return None
    seconds = BatchSeconds(_BATCH_SLOPE_GPU if gpu_layers else _BATCH_SLOPE_CPU)
    if options.draft is None:
        return Speculation(head() if head else Lookup(), seconds) if options.speculate else None
    small = LoadOptions(
        context=context.n_ctx,
        gpu_layers="all" if gpu_layers else 0,
        threads=options.threads,
        cache=0,
        speculate=False,
        repack=options.repack,
    )
    loaded = load_file(options.draft, small, None)
    try:
        drafter = DraftModel(options.draft.name, loaded.model, loaded.context, loaded.vocabulary, vocabulary)
    except BaseException:
        loaded.context.close()
        native.library().llama_model_free(loaded.model)
        raise
    return Speculation(drafter, seconds)


def _attempt(
    path: Path,
    split: Split,
    settings: ContextOptions,
    options: LoadOptions,
    progress: LoadProgress | None,
    *,
    head: bool,
    repack: bool,
) -> tuple[Any, Context]:
    """One try. Raises LoadError; nothing stays in memory then."""
    lib = native.library()
    params = model_params(split)
    params.load_mode = lib.LLAMA_LOAD_MODE_AUTO
    params.load_mtp = head
    params.use_extra_bufts = repack and not _computes_with_amx()
    stopped = False
    failure: list[BaseException] = []

    def on_progress(fraction: float, _user_data: object) -> bool:
        try:
            if progress is not None:
                progress(fraction)
        except BaseException as error:  # must not cross the C frames: carried past them
            failure.append(error)
        return not stopped and not failure

    def stop() -> None:
        nonlocal stopped
        stopped = True

    params.progress_callback = lib.llama_progress_callback(on_progress)

    def work() -> tuple[Any, Context]:
        model = native.load_model(path, params)
        try:
            if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
                raise LoadError(f"{path.name} is no model that continues text (it has an encoder)", path=path)
            context = Context(model, settings)
            try:
                apply_adapters(model, context.pointer, options.loras)
            except BaseException:
                context.close()
                raise
            return model, context
        except BaseException:
            lib.llama_model_free(model)
            raise

    try:
        return native.run_interruptibly(work, stop)
    except LoadError:
        if failure:
            raise failure[0] from None
        raise


def _computes_with_amx() -> bool:
    """Whether repacked weights would go through AMX tiles.

    GCC before 11.5, 12.4 and 13.3 (its bug 114098) drops the stores that set the tiles up, and the first product
    ends the process. A build does not say which compiler made it; one without AMX repacks in other ways.
    """
    return b"AMX_INT8 = 1" in native.library().llama_print_system_info()


def _is_memory_failure(error: LoadError) -> bool:
    return any(sign in _said(error).lower() for sign in _MEMORY_FAILURE)


def _said(error: LoadError) -> str:
    log = error.facts.get("log", ())
    return " ".join([str(error), *(log if isinstance(log, tuple) else ())])

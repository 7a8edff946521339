"""Loading a model: onto a GPU where one takes it, with less of it where not, and saying what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from models import native
from models.errors import LoadError, UsageError
from models.gguf_file import GgufFile
from models.gguf_parts import check_model_file
from models.library import home
from models.native import Vocabulary
from models.text import human_bytes
from runner import devices, placement, rpc
from runner.devices import Device
from runner.engine.adapters import apply_adapters
from runner.engine.context import Context
from runner.engine.context_params import BATCH, ContextOptions
from runner.engine.draft_model import DraftModel
from runner.engine.lookup import Lookup
from runner.engine.memory import available_memory
from runner.engine.model_params import model_params
from runner.engine.prediction_head import PredictionHead, has_prediction_head
from runner.engine.protocol import LoadOptions, LoadProgress
from runner.engine.speculation import BatchSeconds, Speculation
from runner.engine.state_files import DEFAULT_LIMIT, StateFiles, model_key
from runner.engine.threads import default_threads
from runner.placement import DEFAULT_KV_TYPES, Placement, Settings, Split
from runner.placing import Wish, place_with_room_to_spare, place_without_asking, rooms
from runner.planner import planner

UNKNOWN_CONTEXT = 8192
"""Tokens of context for a model that does not say on how many it was trained."""
SMALLEST_CONTEXT = 512
_SPARE_SHARE = 8
"""A share of the memory beside the weights, for what only saves time: memories kept aside, whole windows."""
_MOST_BRANCH_BYTES, _BRANCH_BYTES_UNKNOWN = 2 << 30, 256 << 20
_BATCH_SLOPE_CPU, _BATCH_SLOPE_GPU = 0.5, 0.1
"""How much longer each further token of a small batch takes than one alone, until that is measured."""
_ROLLBACKS = (7, 3)
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
        rollback=_rollback(gguf, beside) if spares and (options.speculate or options.draft) else 0,
    )

    head = spares and options.speculate and options.draft is None and has_prediction_head(gguf)
    remaining = placement.fewer_layers(split.gpu_layers)
    while True:
        try:
            model, context = _attempt(path, split, settings, options, progress, head=head)
            break
        except LoadError as error:
            if not _is_memory_failure(error):
                raise
            if settings.rollback or settings.whole_window or head:
                settings, head = replace(settings, rollback=0, whole_window=False), False
                notes.append("there is no memory for what only saves time (guesses, a whole window); tried without")
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
        branch_bytes=_BRANCH_BYTES_UNKNOWN if spare is None else min(_MOST_BRANCH_BYTES, spare // _SPARE_SHARE),
        states=_states(path, options, settings),
        speculation=speculation,
    )


def wish_of(n_ctx: int, options: LoadOptions) -> Wish:
    """What `options` ask of a placement, with a context of `n_ctx` tokens."""
    beside = [path for path, _ in options.loras] + ([options.draft] if options.draft else [])
    return Wish(
        Settings(n_ctx, DEFAULT_KV_TYPES if options.kv_types == "auto" else options.kv_types, options.batch or BATCH),
        options.gpu_layers,
        vram=options.vram,
        reserve=options.reserve,
        beside=sum(path.stat().st_size for path in beside if path.is_file()),
        reduce_kv=options.kv_types == "auto",
        reduce_context=options.context == "auto",
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
            available = devices.offload_devices(asked.devices())
            plan = asked.place(gguf, available, wish, repack=options.repack)
    except LoadError as error:
        if not error.facts.get("lost"):
            raise
        notes.append(f"no GPU is used: {error}")
        return place_without_asking(gguf, [], wish), []
    notes += plan.notes
    if not plan.is_all:
        notes.append(str(plan))
    _check_memory(plan, notes)
    return plan, available


def _check_memory(plan: Placement, notes: list[str]) -> None:
    """Whether the machine's own memory holds what is not on a GPU. Raises LoadError where it cannot.

    Weights that it does not hold are read from the file again and again.
    """
    rest, available = plan.buffers[placement.CPU], available_memory()
    if available is None or rest.total <= available:
        return
    if rest.kv + rest.compute > available:
        raise LoadError(
            f"a context of {plan.settings.n_ctx} tokens takes {human_bytes(rest.kv + rest.compute)} beside what a GPU"
            f" holds, and {human_bytes(available)} of memory are available",
            hint="--context auto takes a smaller one, or --kv-type auto a smaller cache",
            n_ctx=plan.settings.n_ctx,
        )
    notes.append(
        f"{human_bytes(rest.total)} are needed beside what a GPU holds, and {human_bytes(available)} of memory are"
        " available: weights will be read from the disk all the time"
    )


def spare_memory(gguf: GgufFile) -> int | None:
    """Bytes that are left beside the weights; None where nobody says."""
    available = available_memory()
    return None if available is None else max(available - gguf.size, available // _SPARE_SHARE)


def spare_beside(gguf: GgufFile, plan: Placement, available: Sequence[Device], wish: Wish) -> int | None:
    """Bytes that are left where the model is put, for what only saves time; None where nobody says.

    Where not all layers found room on the devices, none.
    """
    if not plan.gpu_layers:
        return spare_memory(gguf)
    if not plan.is_all:
        return 0
    layers, used = placement.read_layers(gguf, plan.settings.kv_types), dict(plan.split.layers)
    room = sum(room.bytes for room in rooms(available, wish) if used.get(room.name))
    return max(0, room - sum(layers.weights) - plan.settings.n_ctx * sum(layers.kv))


def choose_window(
    gguf: GgufFile, n_ctx: int, kv_types: tuple[str, str], spare: int | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether a model that looks back a window only gets a cache of everything, which can be cut anywhere; a note."""
    if not gguf.integer(f"{gguf.architecture}.attention.sliding_window"):
        return False, ()
    whole = n_ctx * sum(placement.kv_bytes_per_token(gguf, kv_types))
    size = human_bytes(whole)
    if spare is not None and whole <= spare // _SPARE_SHARE:
        return True, (f"sliding window: the whole cache is kept ({size}), so that it can be cut anywhere",)
    return False, (f"sliding window: only the window is kept (the whole would take {size}), with checkpoints",)


def _rollback(gguf: GgufFile, spare: int | None) -> int:
    """Tokens that a recurrent model may compute on trial: each costs a copy of its state."""
    arch = gguf.architecture
    width, height = (gguf.integer(f"{arch}.ssm.{key}") or 0 for key in ("inner_size", "state_size"))
    if not height and not gguf.integer(f"{arch}.shortconv.l_cache"):
        return 0  # it is not recurrent
    state = placement.block_count(gguf) * width * height * 4  # an upper bound: of every block, in F32
    room = (spare or 0) // _SPARE_SHARE
    return next((n for n in _ROLLBACKS if n * state <= room), 0)


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


def choose_context(gguf: GgufFile, options: LoadOptions, *, offload: bool = False) -> tuple[int, list[str]]:
    """Tokens of context, and a note where it is not simply what was asked for or what the model knows.

    Raises UsageError for no number of tokens, LoadError for more than the memory can hold; with `offload` it need not
    hold them alone.
    """
    trained, asked = gguf.context_length or 0, None if options.context == "auto" else options.context
    kv_types = DEFAULT_KV_TYPES if options.kv_types == "auto" else options.kv_types
    per_token = sum(placement.kv_bytes_per_token(gguf, kv_types))
    available = available_memory()
    if asked is not None:
        if asked < 1:
            raise UsageError(f"a context of {asked} tokens is none", hint="--context takes a number from 1 up")
        if not offload and available is not None and asked * per_token > available:
            raise LoadError(
                f"a context of {asked} tokens takes {human_bytes(asked * per_token)}"
                f" and {human_bytes(available)} of memory are available",
                hint=f"--context {_affordable(available, per_token)} fits, or a smaller --kv-type",
                n_ctx=asked,
            )
        note = f"the model was trained on {trained} tokens of context; beyond that its answers decay"
        return asked, [note] if 0 < trained < asked else []
    n_ctx = trained or UNKNOWN_CONTEXT
    spare = spare_memory(gguf)
    if spare is not None and per_token > 0 and (affordable := _affordable(spare // 2, per_token)) < n_ctx:
        n_ctx = max(affordable, min(SMALLEST_CONTEXT, n_ctx))
        return n_ctx, [f"context of {n_ctx} tokens, of {trained or 'unknown'} trained: memory does not hold more"]
    return n_ctx, []


def _affordable(memory: int, per_token: int) -> int:
    return memory // per_token // 256 * 256


def _attempt(
    path: Path,
    split: Split,
    settings: ContextOptions,
    options: LoadOptions,
    progress: LoadProgress | None,
    *,
    head: bool,
) -> tuple[Any, Context]:
    """One try. Raises LoadError; nothing stays in memory then."""
    lib = native.library()
    params = model_params(split)
    params.load_mode = lib.LLAMA_LOAD_MODE_AUTO
    params.load_mtp = head
    params.use_extra_bufts = options.repack and not _computes_with_amx()
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
    log = error.facts.get("log", ())
    text = " ".join([str(error), *(log if isinstance(log, tuple) else ())]).lower()
    return any(sign in text for sign in _MEMORY_FAILURE)

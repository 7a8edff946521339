"""Loading a model: onto a GPU where one takes it, with less of it where not, and saying what happened."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import native
from models.errors import LoadError, UsageError
from models.gguf_file import GgufFile
from models.gguf_parts import check_model_file, read_model
from models.native import Vocabulary
from models.text import human_bytes
from runner import devices, placement
from runner.engine.context import Context
from runner.engine.memory import available_memory
from runner.engine.protocol import LoadOptions, LoadProgress
from runner.engine.threads import default_threads

DEFAULT_CONTEXT = 8192
SMALLEST_CONTEXT = 512
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
    seconds: float
    notes: tuple[str, ...]


def load_file(path: Path, options: LoadOptions, progress: LoadProgress | None) -> Loaded:
    """Load `path` as `options` say. Raises ModelFileError, LoadError, UsageError.

    Ctrl-C is heard while it loads, and stops it.
    """
    started = time.perf_counter()
    check_model_file(path)
    gguf = read_model(path)
    n_ctx, notes = choose_context(gguf, options.context)
    threads = options.threads or default_threads()
    native.set_verbose(options.verbose)

    available = devices.offload_devices() if options.gpu_layers != 0 else []
    plan = placement.place(gguf, n_ctx=n_ctx, asked=options.gpu_layers, vram=options.vram, available=available)
    if not available and options.gpu_layers != 0:
        notes.append(devices.why_no_gpu())
    elif 0 < plan.gpu_layers < plan.n_layers and options.gpu_layers == "auto":
        notes.append(str(plan))

    layers = plan.gpu_layers
    remaining = placement.fewer_layers(layers)
    while True:
        try:
            model, context = _attempt(path, layers, n_ctx, threads, options.repack, progress)
            break
        except LoadError as error:
            fewer = next(remaining, None)
            if fewer is None or not _is_memory_failure(error):
                raise
            where = f"{fewer} on the GPU" if fewer else "the CPU alone"
            notes.append(f"the GPU has no memory for {layers} layers; tried again with {where}")
            layers = fewer
    try:
        vocabulary = Vocabulary(native.library().llama_model_get_vocab(model))
        metadata = native.model_metadata(model)
    except BaseException:
        context.close()
        native.library().llama_model_free(model)
        raise
    return Loaded(
        gguf=gguf,
        model=model,
        context=context,
        vocabulary=vocabulary,
        metadata=metadata,
        gpu_layers=layers,
        n_layers=plan.n_layers,
        device=" + ".join(f"{d.name} ({d.description})" for d in available) if layers else "CPU",
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def choose_context(gguf: GgufFile, asked: int | None) -> tuple[int, list[str]]:
    """Tokens of context, and a note where it is not simply what was asked for or what the model knows.

    Raises UsageError for no number of tokens, LoadError for more than the memory can hold.
    """
    trained = gguf.context_length or 0
    per_token = sum(placement.kv_bytes_per_token(gguf))
    available = available_memory()
    if asked is not None:
        if asked < 1:
            raise UsageError(f"a context of {asked} tokens is none", hint="--context takes a number from 1 up")
        if available is not None and asked * per_token > available:
            raise LoadError(
                f"a context of {asked} tokens takes {human_bytes(asked * per_token)}"
                f" and {human_bytes(available)} of memory are available",
                hint="a smaller --context",
                n_ctx=asked,
            )
        note = f"the model was trained on {trained} tokens of context; beyond that its answers decay"
        return asked, [note] if 0 < trained < asked else []
    n_ctx = min(trained, DEFAULT_CONTEXT) if trained > 0 else DEFAULT_CONTEXT
    if available is not None and per_token > 0:
        affordable = int(available / 2 / per_token) // 256 * 256
        if affordable < n_ctx:
            n_ctx = max(affordable, min(SMALLEST_CONTEXT, n_ctx))
            return n_ctx, [f"context of {n_ctx} tokens: memory does not hold more"]
    return n_ctx, []


def _attempt(
    path: Path, gpu_layers: int, n_ctx: int, threads: int, repack: bool, progress: LoadProgress | None
) -> tuple[Any, Context]:
    """One try. Raises LoadError; nothing stays in memory then."""
    lib = native.library()
    params = lib.llama_model_default_params() if gpu_layers else native.cpu_model_params()
    params.n_gpu_layers = gpu_layers
    params.load_mode = lib.LLAMA_LOAD_MODE_AUTO
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
            return model, Context(model, n_ctx=n_ctx, threads=threads)
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

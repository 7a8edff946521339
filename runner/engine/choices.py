"""What a load decides by memory: how much context, whether a whole window, and copies that only save time."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import LoadError, UsageError
from models.gguf_file import GgufFile
from models.text import human_bytes
from runner import placement
from runner.devices import Device
from runner.engine.context_params import BATCH
from runner.engine.memory import available_memory, memory_limits
from runner.engine.protocol import LoadOptions
from runner.placement import DEFAULT_KV_TYPES, Buffers, Placement, Settings
from runner.placing import Wish, rooms

UNKNOWN_CONTEXT = 8192
"""Tokens of context for a model that does not say on how many it was trained."""
SMALLEST_CONTEXT = 512
SPARE_SHARE = 8
"""A share of the memory beside the weights, for what only saves time: memories kept aside, whole windows."""
_ADDRESSES_LEFT = 128 << 20
_ROLLBACKS = (7, 3)


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


def spare_memory(gguf: GgufFile) -> int | None:
    """Bytes that are left beside the weights; None where nobody says."""
    available = available_memory()
    return None if available is None else max(available - gguf.size, available // SPARE_SHARE)


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
    if spare is not None and whole <= spare // SPARE_SHARE:
        return True, (f"sliding window: the whole cache is kept ({size}), so that it can be cut anywhere",)
    return False, (f"sliding window: only the window is kept (the whole would take {size}), with checkpoints",)


def rollbacks(gguf: GgufFile, spare: int | None) -> int:
    """Tokens that a recurrent model may compute on trial: each costs a copy of its state."""
    arch = gguf.architecture
    width, height = (gguf.integer(f"{arch}.ssm.{key}") or 0 for key in ("inner_size", "state_size"))
    if not height and not gguf.integer(f"{arch}.shortconv.l_cache"):
        return 0  # it is not recurrent
    state = placement.block_count(gguf) * width * height * 4  # an upper bound: of every block, in F32
    room = (spare or 0) // SPARE_SHARE
    return next((n for n in _ROLLBACKS if n * state <= room), 0)


def _available_beside(gguf: GgufFile) -> int | None:
    """Bytes for a model's weights, cache and compute buffers, while its file is mapped.

    Of that the system keeps in memory what it can. But a limit on addresses counts all of it, and a program that has
    none left for the little that it still wants ends.
    """
    limits = memory_limits()
    if "process" in limits:
        limits["process"] = max(0, limits["process"] - gguf.size - _ADDRESSES_LEFT)
    return min(limits.values(), default=None)


def may_lack_memory(gguf: GgufFile, plan: Placement) -> bool:
    """Whether, by the header, the machine's own memory may be too small for what is not on a GPU.

    The header does not tell of compute buffers, and of a cache it tells the most that there can be.
    """
    available, layers = _available_beside(gguf), placement.read_layers(gguf, plan.settings.kv_types)
    kv = [plan.settings.n_ctx * each for each in layers.kv]
    everything = sum(tensor.nbytes for tensor in gguf.tensors) + sum(kv)
    rest = everything - sum(placement.reckoned(layers, plan.split, kv).values())
    return available is not None and rest > available - available // SPARE_SHARE


def holds_weights(gguf: GgufFile, plan: Placement, notes: list[str]) -> bool:
    """Whether the machine's own memory holds what is not on a GPU. Raises LoadError where not even the cache fits.

    Weights that it does not hold are best left in the file: copied, the system would have to end a process.
    """
    rest, available = plan.buffers.get(placement.CPU, Buffers()), _available_beside(gguf)
    if available is None or rest.total <= available:
        return True
    beside = " beside what a GPU holds" if plan.gpu_layers else ""
    if rest.kv + rest.compute > (most := available_memory() or 0):
        raise LoadError(
            f"a context of {plan.settings.n_ctx} tokens takes {human_bytes(rest.kv + rest.compute)}{beside}"
            f", and {human_bytes(most)} of memory are available",
            hint="--context auto takes a smaller one, or --kv-type auto a smaller cache",
            n_ctx=plan.settings.n_ctx,
        )
    notes.append(
        f"{human_bytes(rest.total)} are needed{beside}, and {human_bytes(available)} of memory are available: weights"
        " will be read from the disk all the time"
    )
    return False

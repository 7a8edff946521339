"""The door to libllama: loading it, its log, vocabularies, one forward pass.

Everything that `convert` and `runner` both need of llama.cpp is here. Importing this module loads nothing;
`library()` does, once. llama.cpp ends the process on some misuse (an id outside the vocabulary, a file
without one), so what it would not survive is checked on this side.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from models import missing_driver
from models.errors import GenerationError, LoadError
from models.native_log import LOG, LogTail, capture_log, set_verbose

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "ATTR_CONTROL",
    "ATTR_UNKNOWN",
    "ATTR_USER_DEFINED",
    "LogTail",
    "Vocabulary",
    "capture_log",
    "cpu_model_params",
    "forward_pass",
    "library",
    "library_folders",
    "load_model",
    "model_metadata",
    "open_vocabulary",
    "run_interruptibly",
    "set_verbose",
    "shared_library",
]

Result = TypeVar("Result")

ATTR_UNKNOWN, ATTR_CONTROL, ATTR_USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
"""Bits of `Vocabulary.attributes`, as llama.h has them."""

_loading = threading.Lock()
_kept_alive: list[Any] = []
"""Callbacks that C code holds: collected, they would crash it."""


@cache
def _library() -> Any:
    lib = _import_library()
    # The binding prints to stderr through a callback of its own; ours replaces it.
    callback = lib.llama_log_callback(LOG.write)
    # Destructors of the libraries may log after the interpreter is gone: to a C function that does nothing.
    silent = ctypes.cast(lib.llama_max_devices, lib.llama_log_callback)
    _kept_alive.extend([callback, silent])
    lib.llama_log_set(callback, None)
    atexit.register(lib.llama_log_set, silent, None)
    lib.llama_backend_init()
    return lib


def _import_library() -> Any:
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, RuntimeError, OSError) as error:
        failure = error
    if missing_driver.DRIVER in str(failure) and any(map(missing_driver.stand_in, library_folders())):
        try:
            return importlib.import_module("llama_cpp.llama_cpp")
        except (ImportError, RuntimeError, OSError) as error:
            failure = error
    raise LoadError(
        f"llama.cpp cannot be loaded: {failure}", hint="`handmill doctor` shows the command that mends it."
    ) from failure


def library_folders() -> list[Path]:
    """Where the libraries of llama.cpp are; nothing is loaded for it."""
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return [Path(chosen)]
    found = importlib.util.find_spec("llama_cpp")
    return [Path(place) / "lib" for place in (found.submodule_search_locations if found else None) or ()]


def library() -> Any:
    """The functions of `llama.h`, with the backends initialised and the log in our hands.

    Raises LoadError where the system's loader refuses them; not for want of NVIDIA's driver (`missing_driver`).
    """
    with _loading:
        return _library()


@cache
def shared_library(name: str) -> ctypes.CDLL:
    """The functions of another library beside libllama, such as "ggml-base", "ggml" or "ggml-rpc".

    Raises LoadError where this build of llama.cpp does not have it.
    """
    lib = library()  # first: importing any part of the binding loads all of it
    from llama_cpp._ctypes_extensions import load_shared_library

    if sys.platform != "win32" and any(lib._base_path.glob(f"lib{name}.*")):
        # A wheel holds copies where there were links (libggml.so, libggml.so.0): opened by its path, a library
        # would be loaded a second time, with a registry of devices of its own. Asked for a name, libllama's
        # handle looks through the libraries that it was linked with.
        return ctypes.CDLL(lib._lib._name)
    try:
        found: ctypes.CDLL = load_shared_library(name, lib._base_path)
    except (FileNotFoundError, RuntimeError) as error:
        raise LoadError(f"this build of llama.cpp has no library {name!r}", library=name) from error
    return found


def run_interruptibly(work: Callable[[], Result], stop: Callable[[], None] = lambda: None) -> Result:
    """Run `work` in a thread and wait for it, so that Ctrl-C is heard while C code runs.

    An exception in a callback from C is swallowed, KeyboardInterrupt too: so no callback may run in the main
    thread. When the wait is interrupted, `stop` is called, `work` is awaited, and the interrupt goes on.
    """
    result: list[Result] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:  # carried to the caller's thread and raised there
            failure.append(error)

    thread = threading.Thread(target=body, name="handmill-native", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)  # on Windows only a wait that ends lets Ctrl-C through
    except BaseException:
        stop()
        thread.join()
        raise
    if failure:
        raise failure[0]
    return result[0]


def load_model(path: Path, params: Any) -> Any:
    """A `llama_model *` of the file. Raises LoadError with the end of llama.cpp's log."""
    lib = library()
    if not path.is_file():
        raise LoadError(f"no such model file: {path}", hint="`handmill list` shows what there is", path=path)
    with capture_log() as log:
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        said = "; ".join(log.problems())
        raise LoadError(f"llama.cpp cannot load {path.name}: {said}", path=path, log=tuple(log.tail(20)))
    return model


def model_metadata(model: Any) -> dict[str, str]:
    """All keys of a loaded model but the arrays, as llama.cpp writes their values."""
    lib = library()

    def read(function: Callable[..., int], index: int) -> str:
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = function(model, index, buffer, room)
            if n < room:
                return buffer.value.decode("utf-8", "replace")
            room = n + 1

    return {
        read(lib.llama_model_meta_key_by_index, i): read(lib.llama_model_meta_val_str_by_index, i)
        for i in range(lib.llama_model_meta_count(model))
    }


def cpu_model_params() -> Any:
    """Model parameters that keep all on the CPU, mapped from the file and not copied into another layout."""
    lib = library()
    params = lib.llama_model_default_params()
    no_devices = (ctypes.c_void_p * 1)(None)
    params._keep_alive = no_devices  # llama.cpp reads the list while it loads
    params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    params.n_gpu_layers = 0
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
    params.use_extra_bufts = False
    return params


class Vocabulary:
    """The vocabulary of a loaded model, by llama.cpp itself. Valid while that model is.

    Raises LoadError for a model that has none, or whose own marks are missing from it.
    """

    def __init__(self, pointer: Any) -> None:
        lib = library()
        self._lib, self._pointer = lib, pointer
        self.n_tokens: int = lib.llama_vocab_n_tokens(pointer)
        self.add_bos: bool = lib.llama_vocab_get_add_bos(pointer)
        self.add_eos: bool = lib.llama_vocab_get_add_eos(pointer)
        self.bos: int | None = self._id(lib.llama_vocab_bos(pointer))
        self.eos: int | None = self._id(lib.llama_vocab_eos(pointer))
        # Tokenizing without these ends the process.
        if lib.llama_vocab_type(pointer) == lib.LLAMA_VOCAB_TYPE_NONE or not self.n_tokens:
            raise LoadError("the model has no vocabulary")
        if (self.add_bos and self.bos is None) or (self.add_eos and self.eos is None):
            raise LoadError("the model asks for a beginning or end mark that its vocabulary does not have")

    @property
    def pointer(self) -> Any:
        """The `llama_vocab *`."""
        return self._pointer

    def _id(self, token: int) -> int | None:
        return token if 0 <= token < self.n_tokens else None

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.n_tokens:
            raise ValueError(f"token {token} is outside the vocabulary of {self.n_tokens}")
        return token

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `add_special` adds the marks that the model wants around a text (BOS, sometimes EOS). With
        `parse_special` the text of a control token becomes that token; without it, user-defined ones still do.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            n: int = self._lib.llama_tokenize(self._pointer, data, len(data), ids, room, add_special, parse_special)
            if n >= 0:
                return ids[:n]
            if -n <= room:
                raise GenerationError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
            room = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; b"" for a control token."""
        self._checked(token)
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n: int = self._lib.llama_token_to_piece(self._pointer, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def text(self, token: int) -> str:
        """The token as the vocabulary writes it (byte-level letters, `▁` and all)."""
        raw: bytes = self._lib.llama_vocab_get_text(self._pointer, self._checked(token))
        return raw.decode("utf-8", "replace")

    def attributes(self, token: int) -> int:
        attributes: int = self._lib.llama_vocab_get_attr(self._pointer, self._checked(token))
        return attributes

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a reply."""
        return bool(self._lib.llama_vocab_is_eog(self._pointer, self._checked(token)))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of all that llama.cpp looks for in a text before it tokenizes the rest.

        Control and unknown tokens are found with `parse_special` only, user-defined ones always.
        """
        wanted = ATTR_CONTROL | ATTR_UNKNOWN | ATTR_USER_DEFINED
        # every id is within the vocabulary, and there may be a quarter of a million
        attributes, pointer = self._lib.llama_vocab_get_attr, self._pointer
        return {self.text(token): token for token in range(self.n_tokens) if attributes(pointer, token) & wanted}


@contextmanager
def open_vocabulary(path: Path) -> Iterator[Vocabulary]:
    """The vocabulary of a GGUF file, without its weights. Raises LoadError."""
    lib = library()
    params = cpu_model_params()
    params.vocab_only = True
    model = run_interruptibly(lambda: load_model(path, params))
    try:
        yield Vocabulary(lib.llama_model_get_vocab(model))
    finally:
        lib.llama_model_free(model)


def _kv_overrides(values: Mapping[str, int | str]) -> Any:
    """A list for `llama_model_params.kv_overrides`, which an empty key ends."""
    lib = library()
    entries = (lib.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(entries, values.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            entry.tag, entry.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return entries


def forward_pass(
    path: Path,
    tokens: Sequence[int],
    *,
    threads: int,
    overrides: Mapping[str, int | str] | None = None,
    adapter: Path | None = None,
) -> NDArray[np.float32]:
    """Logits [n_vocab] of the last of `tokens`, computed on the CPU from the mapped file.

    Private memory stays small: the weights are neither copied nor repacked. The cache is F32 and attention is
    computed step by step, so that the logits can be held against those of another implementation. `overrides` are
    metadata taken instead of the file's; a LoRA `adapter` is applied. Raises LoadError and GenerationError.
    """
    if not tokens:
        raise ValueError("a forward pass needs at least one token")
    return run_interruptibly(lambda: _forward_pass(path, tokens, threads, overrides, adapter))


def _forward_pass(
    path: Path,
    tokens: Sequence[int],
    threads: int,
    overrides: Mapping[str, int | str] | None,
    adapter: Path | None,
) -> NDArray[np.float32]:
    import numpy as np

    lib = library()
    model_params = cpu_model_params()
    if overrides:
        model_params.kv_overrides = _kv_overrides(overrides)
    model = load_model(path, model_params)
    context = None
    try:
        if lib.llama_model_has_encoder(model):
            raise GenerationError(f"{path.name} has an encoder, which a forward pass does not begin with", path=path)
        params = lib.llama_context_default_params()
        params.n_ctx = max(len(tokens), 16)
        params.n_batch = params.n_ubatch = len(tokens)
        params.n_threads = params.n_threads_batch = threads
        params.offload_kqv = params.op_offload = False
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with capture_log() as log:
            context = lib.llama_init_from_model(model, params)
            if not context:
                said = "; ".join(log.problems())
                raise LoadError(f"llama.cpp cannot make a context for {path.name}: {said}", path=path)
            if adapter is not None:
                lora = lib.llama_adapter_lora_init(model, os.fsencode(adapter))
                one, scale = (lib.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
                if not lora or lib.llama_set_adapters_lora(context, one, 1, scale) != 0:
                    said = "; ".join(log.problems())
                    raise LoadError(f"llama.cpp cannot apply {adapter.name} to {path.name}: {said}", path=adapter)
            ids = (ctypes.c_int32 * len(tokens))(*tokens)
            status = lib.llama_decode(context, lib.llama_batch_get_one(ids, len(tokens)))
            if status != 0:
                said = "; ".join(log.problems())
                raise GenerationError(f"llama.cpp cannot compute with {path.name}: {said}", path=path)
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        pointer = lib.llama_get_logits_ith(context, -1)
        if not pointer:
            raise GenerationError(f"{path.name} gives no logits: it does not continue a text", path=path)
        logits = np.ctypeslib.as_array(pointer, shape=(n_vocab,))
        return logits.astype(np.float32, copy=True)
    finally:
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)

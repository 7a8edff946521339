"""A model in one GGUF file or in several: `NAME-00001-of-00003.gguf` and so on, as llama.cpp names them.

The first part holds all metadata and is the one to load; llama.cpp finds the others by their names.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import NoReturn

from models.errors import ModelFileError
from models.gguf_file import GgufFile, LazyArray, read_gguf
from models.text import printable

MAX_PARTS = 65_535
MAX_BLOCKS = 512
"""`LLAMA_MAX_LAYERS`."""
MAX_EXPERTS = 1024
"""`LLAMA_MAX_EXPERTS`."""
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_NAME = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def part_name(base: str, number: int, count: int) -> str:
    """The file name of part `number` (from 1) of `count`."""
    return f"{base}-{number:05d}-of-{count:05d}.gguf"


def split_name(stem: str) -> tuple[str, int, int] | None:
    """Base, number (from 1) and count that a file's name without its ending tells; None for a whole file."""
    found = _NAME.fullmatch(stem)
    return (found["base"], int(found["number"]), int(found["count"])) if found else None


def read_parts(path: Path) -> tuple[GgufFile, ...]:
    """The file at `path` and the other parts of its model, in order, each held against the first.

    Raises ModelFileError: a part is missing or damaged, it is of another set, or `path` is not the first.
    """
    first = read_gguf(path)
    number, count = first.integer("split.no") or 0, first.integer("split.count") or 0
    if number and count:
        raise ModelFileError(
            f"{printable(path)} is part {number + 1} of {count}",
            hint=f"Give the first part: the file whose name ends in -00001-of-{count:05d}.gguf.",
            path=path,
        )
    if count < 2:
        return (first,)
    named = split_name(path.stem)
    if named is None or named[1:] != (1, count) or path.suffix != ".gguf":
        _fail(path, f"is the first of {count} parts, and its name does not end in {part_name('', 1, count)}")
    parts = [first, *(read_gguf(path.with_name(part_name(named[0], i, count))) for i in range(2, count + 1))]
    names: set[str] = set()
    for i, part in enumerate(parts):
        if part.integer("split.no") != i or part.integer("split.count") != count:
            _fail(part.path, f"does not say that it is part {i + 1} of {count}")
        for tensor in part.tensors:
            if tensor.name in names:
                _fail(part.path, f"has the tensor {printable(tensor.name)!r} of an earlier part")
            names.add(tensor.name)
    if len(names) != first.integer("split.tensors.count"):
        _fail(path, f"announces {first.integer('split.tensors.count')} tensors, its parts have {len(names)}")
    return tuple(parts)


def read_model(path: Path) -> GgufFile:
    """The whole model as one: metadata of the first part, tensors and bytes of all. Raises ModelFileError.

    The offset of a tensor is that in its own part.
    """
    return _joined(read_parts(path))


def _joined(parts: tuple[GgufFile, ...]) -> GgufFile:
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return replace(parts[0], size=sum(part.size for part in parts), tensors=tensors)


def check_model_file(path: Path) -> GgufFile:
    """`read_model` of what llama.cpp can load. Raises ModelFileError.

    Values with which llama.cpp ends the process are refused.
    """
    gguf = read_model(path)
    if "general.architecture" not in gguf.metadata:
        raise ModelFileError(
            f"{printable(path)} is a GGUF file that names no architecture, so it is no model",
            hint="It may be an adapter or an importance matrix. Give the model that it belongs to.",
            path=path,
        )
    for key, value in gguf.metadata.items():
        bad = isinstance(value, float) and not (isfinite(value) and (value >= 0 or not key.endswith("_epsilon")))
        if key.endswith(".block_count") and isinstance(value, int):
            bad = not 1 <= value <= MAX_BLOCKS
        if bad:
            raise ModelFileError(
                f"{printable(path)}: {printable(key)} is {printable(value)}, with which no model computes",
                hint="Download or convert the file again.",
                path=path,
            )
    if problem := _experts_problem(gguf) or _blocks_problem(gguf) or _rope_problem(gguf):
        raise ModelFileError(f"{printable(path)}: {problem}", hint="Download or convert the file again.", path=path)
    return gguf


def _experts_problem(gguf: GgufFile) -> str:
    """What llama.cpp asserts of a mixture's numbers (`llama_model_base::load_hparams`), if it does not hold."""
    count, groups, used_groups = (
        gguf.integer(f"{gguf.architecture}.expert_{name}") or 0
        for name in ("count", "group_count", "group_used_count")
    )
    used = gguf.metadata.get(f"{gguf.architecture}.expert_used_count", 0)
    most = max((n for n in (used if isinstance(used, LazyArray) else [used]) if isinstance(n, int)), default=0)
    if not 0 <= count <= MAX_EXPERTS:
        return f"a mixture of {count} experts is none that llama.cpp computes"
    if not (most <= count and (most > 0 or count == 0)):
        return f"{most} of {count} experts are used, with which no model computes"
    if groups and not (groups < count and count % groups == 0 and (groups == 1 or used_groups < groups)):
        return f"{count} experts in {groups} groups, of which {used_groups} are used, with which no model computes"
    return ""


def _blocks_problem(gguf: GgufFile) -> str:
    """The same of blocks of a kind, which are among those counted."""
    count = gguf.integer(f"{gguf.architecture}.block_count")
    for kind in ("nextn_predict_layers", "posnet.block_count", "convnext.block_count"):
        some = gguf.integer(f"{gguf.architecture}.{kind}") or 0
        if count is not None and not 0 <= some <= count:
            return f"{kind} is {some} of {count} blocks, with which no model computes"
    return ""


def _rope_problem(gguf: GgufFile) -> str:
    """The same of rotary positions: a scaling that is known, and pairs of numbers that a head has."""
    arch = gguf.architecture
    kind = gguf.string(f"{arch}.rope.scaling.type")
    if kind is not None and kind not in _ROPE_SCALINGS:
        return f"rope.scaling.type is {printable(kind)!r}, which llama.cpp does not know"
    heads = gguf.metadata.get(f"{arch}.attention.head_count")
    counts = [n for n in (heads if isinstance(heads, LazyArray) else [heads]) if isinstance(n, int) and n > 0]
    width = (gguf.integer(f"{arch}.embedding_length") or 0) // min(counts) if counts else 0
    for suffix in ("", "_swa"):
        turned = gguf.integer(f"{arch}.rope.dimension_count{suffix}") or 0
        key = gguf.integer(f"{arch}.attention.key_length{suffix}") or gguf.integer(f"{arch}.attention.key_length")
        if turned % 2 or ((key or width) and turned > (key or width)):
            return f"rope.dimension_count{suffix} is {turned} of {key or width}, with which no model computes"
    return ""


def _fail(path: Path, what: str) -> NoReturn:
    raise ModelFileError(
        f"{printable(path)} {what}", hint="Download the parts again, under their own names.", path=path
    )

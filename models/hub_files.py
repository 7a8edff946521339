"""Which files of a repository on the hub are needed. Nothing here touches the network.

Names in a listing are a stranger's: a checkpoint's are taken from a fixed set, and a GGUF file's is used only where
it is a plain file name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch

from models.errors import HubError
from models.text import printable

DEFAULT_FILE_TYPE = "Q4_K_M"

_REF = re.compile(r"([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})(?::([A-Za-z0-9_-]{1,24}))?", re.ASCII)
_CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SHARDS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
"""Shards and their index. The first pattern that matches anything: many repositories hold the same weights twice, as
`consolidated` or for PyTorch too."""
_TYPE_IN_NAME = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d+_[A-Z0-9_]+|TQ\d_0|MXFP4(?:_MOE)?|BF16|F16|F32))(?=[-._/]|$)", re.IGNORECASE
)
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True)
class HubRef:
    """`owner/name[:TYPE]`."""

    owner: str
    name: str
    file_type: str | None = None

    @property
    def repo(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"{self.repo}:{self.file_type}" if self.file_type else self.repo


@dataclass(frozen=True)
class HubFile:
    name: str
    size: int
    digest: str
    """SHA-256 of the content (64 digits), or git's SHA-1 of it as a blob (40 digits)."""


@dataclass(frozen=True)
class Listing:
    ref: HubRef
    commit: str
    files: tuple[HubFile, ...]

    def matching(self, pattern: str) -> list[HubFile]:
        return [f for f in self.files if fnmatch(f.name, pattern) and re.fullmatch(r"[\w.-]+", f.name, re.ASCII)]


def parse_ref(text: str) -> HubRef | None:
    """The hub reference that `text` is; None when it does not have that form."""
    match = _REF.fullmatch(text)
    if match is None or ".." in text:
        return None
    owner, name, file_type = match.groups()
    return HubRef(owner, name, file_type.upper() if file_type else None)


def pick_checkpoint(listing: Listing) -> list[HubFile]:
    """What a conversion needs of a repository, and nothing else: no weights twice, no .onnx, nothing in folders.

    Raises HubError.
    """
    matches = ((listing.matching(pattern), index) for pattern, index in _SHARDS)
    shards, index = next((match for match in matches if match[0]), ([], ""))
    wanted = [file for file in listing.files if file.name in (*_CHECKPOINT_FILES, index)] + shards
    for missing, there in (
        ("config.json", any(file.name == "config.json" for file in wanted)),
        ("*.safetensors and no pytorch_model*.bin", bool(shards)),
    ):
        if not there:
            raise HubError(
                f"{listing.ref.repo} has no {missing}, so it is no checkpoint that can be converted",
                hint="Look for another repository of this model, one with safetensors or GGUF files.",
                repo=listing.ref.repo,
            )
    return wanted


def pick_gguf(listing: Listing) -> list[HubFile]:
    """The file of the type asked for, or all parts of it, in order."""
    by_type: dict[str, dict[str, list[HubFile]]] = {}
    for file in sorted(listing.files, key=lambda file: file.name):
        if is_model(file.name):
            found = _TYPE_IN_NAME.findall(_PART.sub("", file.name).removesuffix(".gguf"))
            kind = found[-1].upper() if found else "?"
            by_type.setdefault(kind, {}).setdefault(_PART.sub("", file.name), []).append(file)
    asked = listing.ref.file_type
    if asked is None and len(by_type) == 1:
        asked = next(iter(by_type))
    models = by_type.get(asked or DEFAULT_FILE_TYPE, {})
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        message = f"{listing.ref.repo} has {len(models)} files of type {asked or DEFAULT_FILE_TYPE}"
        hint = "There is: " + ", ".join(printable(name) for name in list(models)[:8]) + ". Download one by hand."
    elif by_type:
        message = f"{listing.ref.repo} has no GGUF file of type {asked or DEFAULT_FILE_TYPE}"
        types = sorted(by_type)
        hint = f"There is {', '.join(types)}. For example: {listing.ref.repo}:{types[0]}"
    else:
        message, hint = f"{listing.ref.repo} has no GGUF file", f"`handmill convert {listing.ref.repo}` may make one."
    raise HubError(message, hint=hint, repo=listing.ref.repo, types=tuple(by_type))


def is_model(name: str) -> bool:
    return name.lower().endswith(".gguf") and _NOT_MODELS.search(name) is None

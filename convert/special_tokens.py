"""Special tokens, whether they are added to a prompt, and the chat template, from wherever a checkpoint keeps them.

The rules are those of gguf's `SpecialVocab` in the llama.cpp that this version runs on, which the release of gguf on
the package index does not have yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.checkpoint import read_json, read_text
from models.errors import TokenizerError
from models.vocabulary_rules import VocabularyRules

_TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass
class SpecialTokens:
    """`ids` by type ("bos", "eos", ...); `add`: whether a prompt begins or ends with one; the chat template is one
    text or a list of {"name": ..., "template": ...}; `named_tokens`: the texts that the config names;
    `ends`: every id that the configs let end a reply."""

    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    chat_template: str | list[dict[str, str]] | None = None
    named_tokens: frozenset[str] = frozenset()
    ends: list[int] = field(default_factory=list)


def read_special_tokens(path: Path, document: Any, config: dict[str, Any] | None) -> SpecialTokens:
    """From `document` (tokenizer.json, parsed), `config` (tokenizer_config.json) and config.json.

    Raises TokenizerError where a file has not the shape that it must have.
    """
    names = {kind: _content((config or {}).get(f"{kind}_token")) for kind in _TYPES}
    names["bos"] = names["bos"] or (names["cls"] if document else None)
    names["eos"] = names["eos"] or (names["sep"] if document else None)
    special = SpecialTokens(chat_template=read_chat_template(path, config))
    special.named_tokens = frozenset(name for name in names.values() if name)
    ids_by_text: dict[str, int] = {}
    if isinstance(document, dict):
        for entry in document.get("added_tokens") or []:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                ids_by_text.setdefault(entry["content"], entry.get("id", -1))
        if isinstance(document.get("post_processor"), dict):
            _read_post_processor(special, names, document["post_processor"])
    for kind, name in names.items():
        flag = (config or {}).get(f"add_{kind}_token")
        if isinstance(flag, bool):
            # the post-processor of tokenizer.json decides: transformers 5 reads no such flag beside it
            special.add.setdefault(kind, flag)
        if config is not None and name in ids_by_text:
            _set_id(special, kind, ids_by_text[name])
    model_config = read_json(path / "config.json") or {}
    text_config = model_config.get("text_config")
    for kind in names:
        value = model_config.get(f"{kind}_token_id")
        if value is None and isinstance(text_config, dict):
            value = text_config.get(f"{kind}_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        _set_id(special, kind, value)
    generation = read_json(path / "generation_config.json") or {}
    special.ends = _ends(generation.get("eos_token_id"), model_config.get("eos_token_id"))
    if special.ends:
        special.ids.setdefault("eos", special.ends[0])
    return special


def _ends(*values: object) -> list[int]:
    """The first of these that is a list: every token that ends a reply, each once.

    A single id says no more than the tokenizer does, and where it says otherwise, llama.cpp believes the tokenizer.
    """
    listed: list[object] = next((value for value in values if isinstance(value, list)), [])
    return list(dict.fromkeys(i for i in listed if type(i) is int and 0 <= i < 2**31))


def add_family_roles(path: Path, special: SpecialTokens, rules: VocabularyRules, tokens: Sequence[bytes]) -> None:
    """What the rules of a family say beyond the files. `tokens` by id: a rule for an absent token does not hold."""
    wanted = {text.encode() for text in (*rules.special.values(), *rules.overrides.values())}
    ids = {token: i for i, token in enumerate(tokens) if token in wanted} if wanted else {}
    for kind, text in rules.special.items():
        _set_id(special, kind, ids.get(text.encode()))
    for kind, text in rules.overrides.items():
        if text.encode() in ids:
            special.ids[kind] = ids[text.encode()]
    if rules.eos_field is not None:
        value = (read_json(path / "config.json") or {}).get(rules.eos_field)
        if type(value) is int and 0 <= value < len(tokens):
            special.ids["eos"] = value
    if rules.add_bos is not None:
        special.add.setdefault("bos", rules.add_bos)


def _set_id(special: SpecialTokens, kind: str, value: object) -> None:
    if type(value) is int and 0 <= value < 2**31:
        special.ids.setdefault(kind, value)


def _content(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_post_processor(
    special: SpecialTokens, names: dict[str, str | None], post_processor: Mapping[str, Any]
) -> None:
    """Which tokens `tokenizers` puts around a text. A new end token moves the old one to `eot`, then to `eom`."""
    steps = post_processor.get("processors", [post_processor])
    for step in steps if isinstance(steps, list) else []:
        kind = step.get("type") if isinstance(step, Mapping) else None
        if kind == "ByteLevel":
            special.add.setdefault("bos", False)
            special.add.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            special.add.update(bos=True, eos=True, sep=True)
        elif kind == "TemplateProcessing":
            single = step.get("single")
            if not isinstance(single, list) or len(single) < 2:
                continue
            first, last = _template_token(single[0]), _template_token(single[-1])
            if first:
                names["bos"] = names["bos"] or first
                names["cls"] = names["cls"] or first
                special.add["bos"] = first in (names["bos"], names["cls"])
            if last:
                if names["eos"] and last != names["eos"]:
                    names["eot" if "eot" not in names else "eom"] = names["eos"]
                names["eos"] = last
                special.add["eos"] = True
            between = _between_texts(step.get("pair"), first, last)
            if between:
                separators = {name for name in (names["sep"], names["eos"]) if name}
                special.add["sep"] = (between[0] in separators and not last) or between[1:] in [
                    [s] for s in separators
                ]


def _template_token(step: object) -> str | None:
    token = step.get("SpecialToken") if isinstance(step, Mapping) else None
    return _content({"content": token.get("id")}) if isinstance(token, Mapping) else None


def _between_texts(pair: object, first: str | None, last: str | None) -> list[str | None]:
    """What stands between the two texts of a pair template, without the tokens around the whole."""
    steps = list(pair) if isinstance(pair, list) else []
    if steps and first and _template_token(steps[0]) == first:
        steps = steps[1:]
    if steps and last and _template_token(steps[-1]) == last:
        steps = steps[:-1]
    return [_template_token(step) for step in steps[1:-1]]


def _read_template(path: Path) -> str | None:
    """A template's text goes into the file as it is: a link must not bring another file of this machine in."""
    folder = path.parent.resolve()
    while folder.name == "additional_chat_templates":
        folder = folder.parent
    # the hub's cache keeps snapshots/COMMIT/ as links into blobs/
    allowed = (folder, folder.parent.parent / "blobs")
    if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
        raise TokenizerError(
            f"{path} is a link that leads out of the checkpoint", hint="Put the template itself there.", path=path
        )
    return read_text(path)


def read_chat_template(path: Path, config: dict[str, Any] | None) -> str | list[dict[str, str]] | None:
    """The chat template: a file chat_template.jinja, else in tokenizer_config.json (transformers 4), else a .json."""
    template: Any = _read_template(path / "chat_template.jinja")
    others = sorted((path / "additional_chat_templates").glob("*.jinja"))
    if template is not None and others:
        template = [{"name": "default", "template": template}]
        template += [{"name": other.stem, "template": _read_template(other)} for other in others]
    if template is None:
        template = (config or {}).get("chat_template")
    if template is None:
        template = (read_json(path / "chat_template.json") or {}).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in template
    ):
        return template
    raise TokenizerError(
        f"{path / 'tokenizer_config.json'}: 'chat_template' is neither a text nor a list of named texts", path=path
    )

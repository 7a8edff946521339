"""What a reply is held to, on a real model: grammars, schemas, stop texts; and how sure the model was of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import GenerationError, HandmillError, UsageError
from runner.cli import main as cli
from runner.engine.gbnf import check_grammar
from runner.engine.grammar import grammar_of_schema
from runner.engine.local import LocalEngine, load
from runner.engine.logprobs import token_logprobs
from runner.engine.protocol import LoadOptions, Sampling
from runner.engine.stops import StopFilter

WARM = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=3, max_tokens=24)


@pytest.fixture(scope="module")
def engine(starter_model: Path) -> Iterator[LocalEngine]:
    with load(starter_model, LoadOptions(context=512, gpu_layers=0, cache=0)) as loaded:
        yield loaded


def reply(
    engine: LocalEngine, sampling: Sampling, prompt: str = "Once upon a time"
) -> tuple[str, list[int], str | None]:
    chunks = list(engine.generate(engine.encode_text(prompt), sampling))
    ids = [chunk.token for chunk in chunks if chunk.token is not None]
    return "".join(chunk.text for chunk in chunks), ids, chunks[-1].finish_reason


@pytest.fixture(autouse=True)
def no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)


# The chain


def test_one_candidate_is_the_greedy_reply(engine: LocalEngine) -> None:
    greedy = reply(engine, Sampling(temperature=0.0, max_tokens=12))
    assert reply(engine, replace(WARM, top_k=1, max_tokens=12)) == greedy


def test_dry_ends_a_repetition(engine: LocalEngine) -> None:
    prompt = "one two three four five\n" * 8 + "one two three"
    plain = Sampling(temperature=0.0, max_tokens=12)
    assert reply(engine, plain, prompt)[0].startswith(" four five")
    assert not reply(engine, replace(plain, dry_multiplier=5.0, dry_breakers=()), prompt)[0].startswith(" four five")


# Constraint

PERSON = {
    "type": "object",
    "title": "A person",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "中"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_a_schema_is_always_followed(engine: LocalEngine, seed: int) -> None:
    sampling = replace(WARM, seed=seed, max_tokens=200, grammar=grammar_of_schema(json.dumps(PERSON)))
    text, _, finish = reply(engine, sampling, "A person as JSON: ")
    assert finish == "stop"
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert person["age"] is None or isinstance(person["age"], int)
    assert set(person["tags"]) <= {"a", "b", "中"}


@pytest.mark.parametrize(
    ("schema", "kind"), [({"type": "boolean"}, bool), ({"const": "x"}, str), ({"type": "null"}, type(None))]
)
def test_small_schemas(engine: LocalEngine, schema: object, kind: type) -> None:
    sampling = replace(WARM, max_tokens=40, grammar=grammar_of_schema(json.dumps(schema)))
    assert isinstance(json.loads(reply(engine, sampling)[0]), kind)


def test_a_schema_with_definitions(engine: LocalEngine) -> None:
    tree = {
        "$defs": {
            "leaf": {"enum": [1, 2]},
            "node": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 4},
        },
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/node"}},
        "required": ["tree"],
    }
    sampling = replace(WARM, max_tokens=60, grammar=grammar_of_schema(json.dumps(tree)))
    assert set(json.loads(reply(engine, sampling)[0])["tree"]) <= {1, 2}


def test_what_is_cut_says_so(engine: LocalEngine) -> None:
    sampling = replace(WARM, max_tokens=4, grammar='root ::= "a" "b"{200}')
    text, ids, finish = reply(engine, sampling)
    assert (finish, len(ids)) == ("length", 4)
    assert set(text) <= set("ab")


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        'root ::= "a',
        "root ::= missing",
        'other ::= "a"',
        "root ::= root",
        'root ::= root "a" | "b"',
        'root ::= x* "a"\nx ::= y\ny ::= x "b" | "c"',
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        'root ::= "a"{1000000000}',
        "\0",
    ],
    ids=range(10),
)
def test_grammars_that_cannot_be_used_are_named_errors(engine: LocalEngine, grammar: str) -> None:
    with pytest.raises((UsageError, GenerationError)):
        reply(engine, replace(WARM, grammar=grammar, max_tokens=4))
    assert reply(engine, Sampling(temperature=0.0, max_tokens=1))[2] == "length"


@given(st.text(alphabet="root:= \n\"'ab()[]|*+?{}1,9-\\<>#", max_size=60))
def test_looking_at_a_grammar_ends_with_nothing_but_a_named_error(text: str) -> None:
    with suppress(UsageError):
        check_grammar(text)


@pytest.mark.parametrize(
    "schema", ["", "[]", "nonsense", '{"type": "strange"}', '{"$ref": "#/nowhere"}', "[" * 100_000]
)
def test_schemas_that_cannot_be_used_are_named_errors(schema: str) -> None:
    with pytest.raises(UsageError):
        grammar_of_schema(schema)


# Log probabilities


def test_logprobs_are_those_of_the_softmax(engine: LocalEngine) -> None:
    sampling = replace(WARM, logprobs=5, max_tokens=3)
    for chunk in engine.generate(engine.encode_text("The capital of France is"), sampling):
        if chunk.token is None:
            continue
        assert chunk.logprobs is not None
        assert len(chunk.logprobs.top) == 5
        values = [value for _, value in chunk.logprobs.top]
        assert values == sorted(values, reverse=True)
        assert sum(np.exp(values)) <= 1
        assert chunk.logprobs.logprob <= values[0]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.integers(0, 20))
def test_logprobs_against_a_reference(values: list[float], n: int) -> None:
    logits = np.array(values, np.float32)
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    found = token_logprobs(logits, 0, n)
    assert found.logprob == pytest.approx(expected[0], abs=1e-5)
    assert [value for _, value in found.top] == pytest.approx(sorted(expected, reverse=True)[:n], abs=1e-5)


# Stop texts


@given(
    st.text(alphabet="ab中", max_size=40),
    st.lists(st.text(alphabet="ab中", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=20),
)
def test_a_stop_text_is_never_shown(text: str, stops: list[str], sizes: list[int]) -> None:
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text if not ends else text[: sum(min(ends))]
    for cuts in ([], sizes, [1] * len(text)):
        filter_, shown, position = StopFilter(stops), "", 0
        for size in [*cuts, len(text)]:
            shown += filter_.feed(text[position : position + size])
            position += size
            if filter_.stopped:
                break
        shown += filter_.flush()
        assert shown == expected


def test_a_reply_ends_before_its_stop_text(engine: LocalEngine) -> None:
    greedy = Sampling(temperature=0.0, max_tokens=20)
    whole, _, _ = reply(engine, greedy)
    stop = whole[8:14]
    text, _, finish = reply(engine, replace(greedy, stop=(stop, "never said")))
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


# The command line


def test_options_reach_the_sampler(starter_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "yes.gbnf").write_text('root ::= "yes"')
    base = ["run", str(starter_model), "-g", "0", "-c", "256", "--cache", "off", "--json", "-q", "Is it?"]
    assert cli.main([*base, "--grammar", str(tmp_path / "yes.gbnf"), "--logprobs", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["text"], facts["finish_reason"]) == ("yes", "stop")
    assert [len(entry["top"]) for entry in facts["logprobs"]] == [2] * facts["generated_tokens"]
    (tmp_path / "schema.json").write_text('{"enum": [7]}')
    options = ["--json-schema", str(tmp_path / "schema.json"), "--kv-type", "q8_0,q5_1", "--mirostat", "2"]
    assert cli.main([*base, *options]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "7"


@pytest.mark.parametrize(
    "options",
    [
        ["--grammar", "missing.gbnf"],
        ["--grammar", "a", "--json-schema", "b"],
        ["--kv-type", "q9"],
        ["--mirostat", "5"],
        ["--top-n-sigma", "x"],
        ["--logit-bias", "5"],
        ["--logprobs", "21"],
        ["--cache", "much"],
        ["--stop", ""],
    ],
    ids=str,
)
def test_bad_options_are_usage_errors(starter_model: Path, options: list[str]) -> None:
    assert cli.main(["run", str(starter_model), "-q", "-g", "0", "-c", "256", "Hi", *options]) == 2


@pytest.mark.parametrize("options", [["--lora", "missing.gguf"], ["--lora", "{model}:0.5"]])
def test_what_is_no_adapter(starter_model: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [option.format(model=starter_model) for option in options]
    assert cli.main(["run", str(starter_model), "-q", "-g", "0", "-c", "256", "Hi", *options]) == 1
    assert "adapter" in capsys.readouterr().err


def test_every_error_has_words(engine: LocalEngine) -> None:
    with pytest.raises(HandmillError) as caught:
        reply(engine, replace(WARM, grammar="root ::= ["))
    assert "grammar" in str(caught.value)


def test_a_string_of_a_schema_is_json() -> None:
    """llama-cpp-python's own rule lets line ends and halves of characters through."""
    (rule,) = (line for line in grammar_of_schema('{"type": "string"}').splitlines() if line.startswith("char ::="))
    assert "\\x00-\\x1F" in rule
    assert "[dD] [0-7]" in rule

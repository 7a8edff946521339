"""Sampling: what may be asked, what a file recommends, and the chain and the grammar on a real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from models.errors import GenerationError, UsageError
from runner.engine.gbnf import check_grammar
from runner.engine.local import LocalEngine, load
from runner.engine.protocol import LoadOptions, Sampling
from runner.engine.recommended import check_sampling, recommended_sampling

WARM = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=7, max_tokens=8)


@pytest.fixture(scope="module")
def engine(starter_model: Path) -> Iterator[LocalEngine]:
    with load(starter_model, LoadOptions(context=256, gpu_layers=0)) as loaded:
        yield loaded


def said(engine: LocalEngine, sampling: Sampling, prompt: str = "Once upon a time") -> str:
    return "".join(chunk.text for chunk in engine.generate(engine.encode_text(prompt), sampling))


@pytest.mark.parametrize(
    "change",
    [
        {"dynatemp_range": 0.5},
        {"typical_p": 0.5},
        {"top_n_sigma": 1.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"dry_multiplier": 2.0, "dry_allowed_length": 1},
        {"mirostat": 1},
        {"mirostat": 2},
        {"samplers": ("temperature", "top_k"), "top_k": 3},
    ],
    ids=str,
)
def test_each_sampler_is_repeatable_and_changes_the_reply(engine: LocalEngine, change: dict[str, object]) -> None:
    prompt = "a b c a b c a b c a b"
    sampling = replace(WARM, **change)  # type: ignore[arg-type]
    first = said(engine, sampling, prompt)
    assert first == said(engine, sampling, prompt)
    assert first != said(engine, WARM, prompt)


def test_a_bias_decides(engine: LocalEngine) -> None:
    (token,) = engine.encode_text("zebra")[:1]
    greedy = Sampling(temperature=0.0, max_tokens=1, logit_bias=((token, 100.0),))
    assert next(chunk.token for chunk in engine.generate(engine.encode_text("A"), greedy)) == token
    with pytest.raises(UsageError, match="logit_bias"):
        said(engine, replace(greedy, logit_bias=((10**6, 1.0),)))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_grammar_holds(engine: LocalEngine, seed: int) -> None:
    grammar = 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]{1,3} | "\\"" [a-z]+ "\\""\n'
    text = said(engine, replace(WARM, seed=seed, grammar=grammar, max_tokens=60))
    assert text.startswith("[")
    assert set(text) <= set('[],"0123456789abcdefghijklmnopqrstuvwxyz')
    assert said(engine, replace(WARM, seed=seed, grammar='root ::= "yes" | "no"')) in ("yes", "no")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('root ::= root "a" | "b"', "left recursion"),
        ('root ::= b root "x" | "y"\nb ::= c\nc ::= ', "left recursion"),
        ('root ::= "x" root', "ever complete"),
        ('a ::= "b"', "root"),
        ("", "empty"),
        ("root ::= " + "(" * 600 + '"a"' + ")" * 600, "nested"),
        ('root ::= "a" <[5]>', "token"),
        ("root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(40)) + 'r40 ::= "x"',
         "too many ways"),
        ('root ::= "a" nothing', "Undefined rule identifier 'nothing'"),
        ('root ::= "a', "unexpected end of input"),
        ("root ::= )", "expecting"),
        ('root ::= a | "x"\na ::= root | "y"', "left recursion"),
    ],
)  # fmt: skip
def test_a_bad_grammar_has_a_name(
    engine: LocalEngine, grammar: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=reason):
        said(engine, replace(WARM, grammar=grammar))
    assert capfd.readouterr().err == ""
    assert said(engine, replace(WARM, grammar='root ::= "yes"')) == "yes"


def test_an_empty_repetition_is_no_left_recursion() -> None:
    check_grammar('root ::= (ws)* "x"\nws ::= [ ]*  # blanks\n')


def test_a_grammar_that_nothing_continues_ends_with_an_error(engine: LocalEngine) -> None:
    with pytest.raises(GenerationError, match="allows no token"):
        said(engine, replace(WARM, grammar='root ::= "a" [b-a]'))


def test_values_are_checked_by_name() -> None:
    check_sampling(Sampling())
    for name, value in {"top_p": float("nan"), "mirostat": 3, "repeat_penalty": 0.0, "temperature": -1.0}.items():
        with pytest.raises(UsageError, match=name):
            check_sampling(replace(Sampling(), **{name: value}))  # type: ignore[arg-type]


def test_recommended_sampling_is_read_defensively() -> None:
    keys = {"temp": "0.699999988", "top_k": "20", "top_p": "0.8", "min_p": "0", "penalty_repeat": "1.05"}
    keys |= {"xtc_probability": "0.5", "xtc_threshold": "0.2", "penalty_last_n": "32", "mirostat": "2"}
    keys |= {"mirostat_tau": "4", "mirostat_eta": "0.200000003", "sequence": "Top-K;nucleus;nonsense;temp"}
    metadata = {f"general.sampling.{key}": value for key, value in keys.items()}
    assert recommended_sampling(metadata) == Sampling(
        0.7, 20, 0.8, 0.0, 1.05, penalty_last_n=32, xtc_probability=0.5, xtc_threshold=0.2, mirostat=2,
        mirostat_tau=4.0, mirostat_eta=0.2, samplers=("top_k", "top_p", "temperature"),
    )  # fmt: skip
    for garbage in ("nan", "inf", "-3", "x", ""):
        assert recommended_sampling(dict.fromkeys(metadata, garbage)) == Sampling()

"""Chat templates: rendered as transformers does, stopped when they do not end."""

from __future__ import annotations

import sys

import pytest

from models.errors import TemplateError
from runner.template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{%- for m in messages -%}\n  {{ m.role }}\n{%- endfor %}", "user"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{{ tools is none }}{{ bos_token }}{{ eos_token }}{{ unset }}", "True<s></s>"),
        ("{{ 'a' ~ 1 ~ none }}{{ 'b' + 'c' }}{{ 'd' * 3 }}{{ 2 ** 5 }}{{ '%s-%d' % ('e', 7) }}", "a1Nonebcddd32e-7"),
        ("{{ messages | map(attribute='content') | join(', ') | upper }}", "HI"),
        ("{{ '{:>4}|{}'.format(1, 2) }}{{ 'x'.center(5) }}", "   1|2  x  "),
        ("{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "36"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
    ],
)  # fmt: skip
def test_renders(source: str, expected: str) -> None:
    assert ChatTemplate(source, bos="<s>", eos="</s>").render(HI) == expected


def test_strftime_now_is_there() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HI).isdigit()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% set a = 'a' * 4000000 %}{% for i in range(99999) %}{{ (a ~ 'b') in a }}{% endfor %}",
        "{% set a = 'a' * 1000000 %}{% set n = namespace(l=[]) %}"
        "{% for i in range(99999) %}{% set n.l = n.l + [a ~ i] %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 9 ** 99999999 }}",
        "{% set x = 9 %}{{ x ** 99999999 }}",
        "{% set n = namespace(x=3) %}{% for i in range(60000) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ [1] * 999999999 }}",
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{{ 'a'.center(9999999999) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
        "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ range(100000) | join(a) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ [[1]] | tojson(indent=999999) }}",
        "{{ ('\n' * 100000) | indent(100000) }}",
    ],
)
def test_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HI)
    assert ChatTemplate("{{ 1 + 1 }}").render(HI) == "2"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must\x1b[31m alternate') }}", r"roles must\\x1b\[31m alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safe|unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_what_it_raises_has_a_name(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        ChatTemplate(source).render(HI)


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ " + "(" * 3000, "{% if 1 %}" * 3000, "{{ " + "-" * 20000 + "1 }}", "x" * 2_000_000],
)
def test_what_cannot_be_read_has_a_name(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source)


def test_a_long_conversation_is_no_endless_loop() -> None:
    messages = HI * 3000
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}{% endif %}{% endfor %}"
    assert ChatTemplate(source).render(messages) == "hi" * 3000


def test_the_trace_function_is_put_back() -> None:
    before = sys.gettrace()
    with pytest.raises(TemplateError):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}").render(HI)
    assert sys.gettrace() is before

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
        ("{% set a, b = [1, (2, 'c')], {'d': [messages[0]]} %}{{ a }}{{ b }}",
         "[1, (2, 'c')]{'d': [{'role': 'user', 'content': 'hi'}]}"),
        ("{% for k, v in {'a': [1, 2, 3]}.items() %}{{ k }}{{ v[1:] }}{{ v[::-1] | tojson }}{% endfor %}",
         "a[2, 3][3, 2, 1]"),
        ("{% set t = [{'type': 'function', 'function': dict(name='f', parameters={'p': ['x']})}] %}{{ t | tojson }}",
         '[{"type": "function", "function": {"name": "f", "parameters": {"p": ["x"]}}}]'),
        ("{% macro f(m) %}{{ m.role }}{{ varargs }}{% endmacro %}{{ f(messages[0], [1], (2,)) }}", "user([1], (2,))"),
        ("{% set ns = namespace(l=[]) %}{% for m in messages * 3 %}{% set ns.l = ns.l + [m] %}{% endfor %}"
         "{{ ns.l | length }}",
         "3"),
        ("{% set x %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ x ~ x }}", "hihi"),
        ("{{ '{0[a]:>4}{{{1}}}'.format({'a': 1}, 'id 1234567') }}{{ '%s' % '1234567' }}{{ 5 | filesizeformat }}",
         "   1{id 1234567}12345675 Bytes"),
        ("{{ [1, 2] | sum }}{{ messages | map(attribute='content') | list }}", "3['hi']"),
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
        "{{ '{0:>{1[w]}}'.format('a', {'w': 300000000}) }}",
        "{{ '{0:>{1[0]}}'.format('a', [300000000]) }}",
        "{{ ('{0:>{1[w]}}' | attr('format'))('a', {'w': 300000000}) }}",
        "{{ '{a:>{b[w]}}'.format_map({'a': 'a', 'b': {'w': 300000000}}) }}",
        "{{ ['%999999999d'] | format(1) }}",
        "{{ ('%9999d' * 600000) % ((1,) * 600000) }}",
        "{% set a = ['a' * 4000000] %}{{ ('{0}' * 100000).format(a) }}",
        "{% set a = ['a' * 4000000] %}{{ a | replace('a', a) }}",
        "{{ [('a' * 4000000)] * 4000000 }}",
        "{{ [2 ** 4000] * 4000000 }}",
        "{{ ([[1]] * 50000) | sum(start=[]) }}",
        "{% set a = 'a' * 4000000 %}" + "{% set b = a[1:] %}" * 300,
        "{% set a = 'a' * 4000000 %}" + "{{ a }}" * 1000,
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}"
        "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    ],
)
def test_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HI)
    assert ChatTemplate("{{ 1 + 1 }}").render(HI) == "2"


@pytest.mark.parametrize(
    "twice",
    [
        "[{0}, {0}]",
        "({0}, {0})",
        "{{'a': {0}, 'b': {0}}}",
        "[{0}] + [{0}]",
        "[{0}] * 2",
        "({0},) * 2",
        "dict(a={0}, b={0})",
        "{{'a': {0}, 'b': {0}}}.values()",
        "{{'a': {0}, 'b': {0}}}.items()",
        "{{'a': {0}, 'b': {0}}}.items().mapping",
        "{{}}.fromkeys('ab', {0})",
        "[1, 2] | map('default', {0}) | list + [{0}, {0}]",
        "[{0}] | batch(2, {0}) | list",
        "[{0}, {0}][:]",
    ],
)
def test_a_container_in_itself_twice_is_stopped_before_anyone_walks_through_it(twice: str) -> None:
    double = "{% set ns.a = " + twice.format("ns.a") + " %}{% set ns.b = " + twice.format("ns.b") + " %}"
    grow = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}" + double + "{% endfor %}"
    for use in ("{{ ns.a == ns.b }}", "{{ ns.a }}", "{{ ns.a | tojson }}"):
        with pytest.raises(TemplateError, match="stopped"):
            ChatTemplate(grow + use).render(HI)


def test_the_arguments_of_a_macro_are_a_container_too() -> None:
    source = (
        "{% set ns = namespace(a=1) %}{% macro f() %}{% set ns.a = varargs %}{% endmacro %}"
        "{% for i in range(60) %}{{ f(ns.a, ns.a) }}{% endfor %}{{ ns.a }}"
    )
    with pytest.raises(TemplateError, match="stopped"):
        ChatTemplate(source).render(HI)


def test_a_namespace_prints_nothing_of_what_is_in_it() -> None:
    nested = "{% set ns.a = namespace(a=ns.a, b=ns.a) %}"
    source = "{% set ns = namespace(a=1) %}{% for i in range(60) %}" + nested + "{% endfor %}{{ [ns.a] }}"
    assert ChatTemplate(source).render(HI) == "[<Namespace>]"


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


def test_a_long_message_may_be_cleaned_up_in_a_loop() -> None:
    source = "{% for m in messages %}{% set c = m.content %}{{ c.replace('/no_think', '') }}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "x" * 3_000_000}]) == "x" * 3_000_000


def test_the_trace_function_is_put_back() -> None:
    before = sys.gettrace()
    with pytest.raises(TemplateError):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}").render(HI)
    assert sys.gettrace() is before

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.chat.render import TerminalFilter


def shown(*pieces: str) -> str:
    terminal = TerminalFilter()
    return "".join(terminal.feed(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H\x1b[?1049hx", "x"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]0;title\x1b\\b", "ab"),
        ("a\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
        ("a\x1b]52;c;ZXZpbA==\x07b", "ab"),
        ("a\x1bPq#0;sixel\x1b\\b", "ab"),
        ("a\x1b_apc\x1b\\b\x1b^pm\x1b\\c\x1bXsos\x1b\\d", "abcd"),
        ("a\x1b(0b\x1b#8c\x1bcd\x1b7e", "abcde"),
        ("a\x9b31mb\x9d0;t\x9cc\x90q\x9cd", "abcd"),
        ("a\x85\x8d\x84b", "ab"),
        ("a\rb\x08\x08c\x07\x00\x7fd\x0b\x0ce", "abcde"),
        ("line\r\nnext\tcell\n", "line\nnext\tcell\n"),
        ("a\u202ecba\u202c\u2066x\u2069", "acbax"),
        ("hidden\U000e0068\U000e0069.", "hidden."),
        ("a\u2028b\u2029c", "a\nb\nc"),
        ("a\udcffb", "a\ufffdb"),
        ("open \x1b]0;never closed\nstill here", "open \nstill here"),
        ("cut \x1b[12中文", "cut 中文"),
        ("esc esc \x1b\x1b[31mx", "esc esc x"),
        ("cancel \x1b]0;t\x18x", "cancel x"),
    ],
)
def test_what_a_terminal_obeys_does_not_pass(text: str, safe: str) -> None:
    assert shown(text) == safe
    assert shown(*text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "请解释Transformer模型。",
        "👩‍👩‍👧‍👦 ❤️ 🏳️‍🌈 👍🏽",
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f!",
        "שלום \u200e(a)\u200f",
        "می\u200cخواهم",
        "e\u0301 ก็ क्षि",
        "[31m is text, ]0; too",
    ],
)
def test_what_scripts_and_emoji_need_passes(text: str) -> None:
    assert shown(text) == text
    assert shown(*text) == text


@given(st.lists(st.text(st.characters() | st.sampled_from("\x1b[]\\;mP\x9b\x9d\n\u202e"), max_size=20)))
def test_whatever_comes_nothing_dangerous_goes_and_pieces_do_not_matter(pieces: list[str]) -> None:
    safe = shown(*pieces)
    assert safe == shown("".join(pieces))
    for char in safe:
        assert char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
        assert char not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

"""Text on which ways of splitting differ: the pre-tokenizer of an unknown tokenizer is searched on it."""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

# Contractions in either case, runs of digits, punctuation and white space, words that change case, scripts with and
# without spaces, numbers beside letters, symbols. No combining marks: see LIMIT_TEXTS in check.py.
_LINES = (
    "I'm you're HE'LL they've we'd isn't don'T 'tis rock'n'roll o'clock the boys' 'quoted' ''double''",
    "WE'RE SHE'S I'D THEY'VE YOU'LL CAN'T I'M 'S 'T 'RE 'VE 'M 'LL 'D l'homme d'accord L’été qu’il it’s",
    "camelCase PascalCase snake_case SCREAMING_SNAKE kebab-case XMLHttpRequest iPhone15Pro macOS HTTPServer2 aB Ab AB",
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890 3.14159 1,000,000 1.5e-10 0xFF 007 2024-01-31",
    "a1 1a a12b34c567 x2y v1.2.3 R2D2 12:34:56 50% $100 €20 £3.50 ¥1000 No.5 #1 1st 2nd 3rd 4x4 1/2 ½ ¾ x² y³ ①②③ Ⅳ",
    "() [] {} <> () => -> <- != == === <= >= && || ++ -- += -= *= /= // /* */ ## ### --- === *** ___ ~~~ ``` ... …… !!! ??? ?!",
    "def f(x, *args, **kw):\n    if x[0] >= 10 and not y:\n        return {'a': [1, 2.5], \"b\": x ** 2}\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]*0.5f; }  // done\n#include <stdio.h>\r\n\r\nint main(void)\r\n{\r\n\treturn 0;\r\n}\r\n",
    "<div class=\"x\">&nbsp;text</div>\n<!-- note -->\n<br/>\n{\"key\": [null, true, -1.0e5]}\nSELECT * FROM t WHERE a='b';\n",
    "one  two   three    four     five      six       seven        eight\ttab\t\ttabs\t\t\tmore \t mixed \t\t end   ",
    "\n \n\n \n\n\n \t \t\t \n  \n   \n    x\n     y\n\n\n\nz\n\t\n\t\t\n", "   leading spaces", "trailing spaces   ", " ", "\n", "\n\n", "\t",
    "https://example.org/path/to?q=a%20b&c=d#frag user.name@example.com C:\\Temp\\x.txt /usr/local/bin ~/.bashrc @user #tag",
    "Hello,world!Hello, world! (Hello) \"Hello\" 'Hello' [Hello] {Hello} <Hello> -Hello _Hello *Hello* =Hello .Hello /Hello",
    " !a  !a ! a . b , c ; d : e ? f (g ) h' i\" j- k_ l/ m\\ n| o+ p= q* r& s^ t% u$ v# w@ x~ y` z",
    "word.\nword!\n\nword?\r\nword;\n  word:\n\tword,\n(word)\n\"word\"\n...\n!!!\n---\n///\n/ /\n",
    "请解释Transformer模型中的注意力机制是如何工作的。人工智能(AI)在2024年的发展:机遇与挑战——“我们准备好了吗?”",
    "中文，标点；符号：测试！真的？（括号）【方括号】《书名》、顿号…… 中 文 空 格 abc中文abc 123中文456 中文\n\n换行",
    "日本語のテキストとひらがな、カタカナ。東京タワーは333メートルです!「こんにちは」と言った。ｱｲｳ ＡＢＣ １２３",
    "한국어 문장도 있습니다. 안녕하세요, 반갑습니다! 123개의 사과와 ABC. ㄱㄴㄷ",
    "Привет, как дела? Добрый день! ПРИВЕТ Москва 2024 год нещо на Български Україна їжак",
    "Γειά σου Κόσμε! Ελληνικά ΑΒΓ αβγ. Հայերեն ქართული",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣ العربية ۱۲۳ فارسی. שלום עולם מה שלומך",
    "Ça va très bien, merci. Übergröße, naïve café, señor, Đặng Thị, łódź, žluťoučký kůň, İstanbul, ÉCOLE Straße",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🇫🇷 ✅🚀 emoji😀in😃words😄 ❤️ ☀ → ← ∑∫√∞≠≈ α+β=γ ©®™ §¶ °C ‰ • – — ‘ ’ “ ” „ « » ¿ ¡",
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG.",
    "In the beginning was the word, and the word was with us; however, nobody would have thought that understanding it",
    "could take more than a thousand years of unsuccessful interpretation (see chapter 12, pages 345-678).",
)  # fmt: skip

_N_SAMPLES = 1500
_JOINTS = ("", " ", "\n", "'", "1", "23", "  ", ".", "-", "\n\n", "(", "A")
_PER_LINE = 24


def search_texts(tokens: Sequence[bytes], control: Sequence[bytes]) -> list[str]:
    """The lines above, and lines of tokens of this very vocabulary side by side: only where a merge crosses it can
    one see where a text is split. `tokens` are byte-level; those of ASCII are sampled. No line has a `control` token
    in it, which the tokenizer would find and llama.cpp, asked to read plain text, would not.
    """
    marks = [mark for mark in (text.decode("utf-8", "replace") for text in control) if mark]
    return [line for line in (*_LINES, *_lines_of(tokens)) if not any(mark in line for mark in marks)]


def _lines_of(tokens: Sequence[bytes]) -> Iterator[str]:
    words = [text for text in map(_ascii, tokens) if text is not None]
    # evenly over the vocabulary, neighbours far apart
    step = max(len(words) // _N_SAMPLES, 1)
    sample = words[::step][:_N_SAMPLES]
    shuffled = iter(sorted(sample, key=lambda word: (hash_of(word), word)))
    number = 0
    while line := list(islice(shuffled, _PER_LINE)):
        joints = [_JOINTS[(number + i) % len(_JOINTS)] for i in range(len(line))]
        yield "".join(part for pair in zip(line, joints, strict=True) for part in pair)
        number += 1


def hash_of(word: str) -> int:
    """The same in every process, unlike `hash`."""
    value = 2166136261
    for byte in word.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def _ascii(token: bytes) -> str | None:
    text = token.decode("utf-8", "replace").replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
    return text if text.isascii() and 0 < len(text) <= 16 else None

"""Texts on which the ids of llama.cpp are held against those of the tokenizer."""

CHECK_TEXTS = (
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "请解释Transformer模型中的注意力机制是如何工作的。",
    "人工智能(AI)在2024年的发展:机遇与挑战——“我们准备好了吗?”",
    "日本語のテキストとひらがな、カタカナ。한국어 문장도 있습니다.",
    "Привет, как дела? Добрый день!",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "Ça va très bien, merci. Übergröße, naïve café, señor, Đặng Thị.",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🇫🇷 ✅🚀 emoji in a row 😀😃😄",
    "def f(x):\n    return x ** 2 + 1\n\n\tif x >= 10: print(f\"{x!r}\")\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0.5e-3; } // done\n#include <stdio.h>",
    "1 12 123 1234 12345 123456 3.14159 1,000,000 0xFF 2024-01-31T12:00:00Z",
    " leading space", "two  spaces   three    four", "tab\there\t\tand\n\nblank lines\n\n\n", "trailing  ",
    "I'm you're HE'LL they've we'd isn't don'T",
    "https://example.org/path?q=a%20b&c=d#frag user@example.com C:\\Temp\\x.txt",
    "ALLCAPS camelCase snake_case kebab-case x²+y³≠z½ €100 £5 ©®™",
)  # fmt: skip

# On these llama.cpp is known to part from tokenizers that normalise (it does not), or split marks off letters.
LIMIT_TEXTS = (
    "de\u0301compose\u0301 e\u0301 a\u0300 n\u0303",
    "नमस्ते दुनिया, यह एक परीक्षण है",
    "สวัสดีชาวโลก ทดสอบ",
)

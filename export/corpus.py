"""Strings on which two tokenizers must agree: languages, code, emoji, white space, numbers, special tokens, noise."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

COUNT = 1000
SEED = 5
WORDS = (
    *(
        "the",
        "Image",
        "shows",
        "HTTPServer",
        "naïve",
        "café",
        "Ünïcödé",
        "coöperate",
        "don't",
        "I'LL",
        "we've",
        "'s",
        "X'S",
    ),
    *(
        "数字",
        "日本語のテキスト",
        "漢字かな交じり",
        "한국어",
        "ภาษาไทย",
        "العربية",
        "עברית",
        "हिन्दी",
        "ελληνικά",
        "цифры",
        "Tiếng Việt",
    ),
    *(
        "中文，标点。",
        "「引用」",
        "ｆｕｌｌｗｉｄｔｈ",
        "ａ１２３",
        "ﬁ",
        "ǅ",
        "ß",
        "İ",
        "ı",
        "Ⅷ",
        "½",
        "²",
        "①",
        "٣",
        "৪",
        "๙",
    ),
)
EMOJI = ("🙂", "👍🏽", "👩‍👩‍👧‍👦", "🇩🇪", "🏳️‍🌈", "❤️", "1️⃣", "😶‍🌫️", "🦙🦙", "✅")
CODE = (
    "def f(x: int) -> str:\n    return f'{x:>8}'\n",
    'for (int i = 0; i < n; ++i) {\n\tprintf("%d\\n", a[i]);\n}',
    "SELECT * FROM t WHERE id=42 AND name LIKE '%x%';",
    '<div class="a">&nbsp;</div>',
    "$ ls -la /tmp | grep 'x' && echo $?",
    "\\frac{1}{2} \\alpha_{i,j}^{n+1}",
    '{"key": [1, 2.5, -3e-7, null, true]}',
    "https://example.org/a_b?c=d&e=%20#f",
    "a+=b; c-->0; x!==y; p->q; z::w; @decorator; #include <stdio.h>",
)
SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\t\t\t",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2028",
    " \t \n ",
)
NUMBERS = (
    "0",
    "7",
    "42",
    "123",
    "1234",
    "1234567890",
    "3.14159",
    "1,000,000",
    "-5",
    "1e-9",
    "0x1F",
    "12:34",
    "2026-11-24",
)
MARKS = (
    ".",
    "...",
    "!?",
    "---",
    "——",
    "«»",
    "“”",
    "'",
    '"',
    "``",
    "()",
    "[]",
    "{}",
    "<>",
    "/",
    "\\",
    "|",
    "~",
    "^",
    "%",
    "&",
    "_",
    "#",
)
COMBINING = ("e\u0301", "a\u0308\u0323", "\u1100\u1161", "ｶﾞ", "\u0915\u094d\u0937")


def corpus(specials: Sequence[str], count: int = COUNT) -> list[str]:
    """`count` different strings, always the same ones.

    Args:
        specials: special tokens of the tokenizer, which stand inside some of the strings.
    """
    return list(_corpus(tuple(specials), count))


@functools.lru_cache(maxsize=8)
def _corpus(specials: tuple[str, ...], count: int) -> tuple[str, ...]:
    rng = np.random.default_rng(SEED)
    # libraries follow the standard at different speeds: only what has been in it for long
    points = [i for i in range(32, 0x20000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
    pools = (WORDS, EMOJI, CODE, SPACES, NUMBERS, MARKS, COMBINING, specials or MARKS)
    found = dict.fromkeys([*EMOJI, *CODE, *SPACES, *NUMBERS, *COMBINING, *specials, "".join(WORDS), " ".join(WORDS)])
    while len(found) < count:
        kind = int(rng.integers(4))
        if kind == 0:  # words with ordinary spaces
            text = " ".join(str(rng.choice(WORDS + NUMBERS)) for _ in range(rng.integers(2, 9)))
        elif kind == 1:  # anything next to anything
            text = "".join(str(rng.choice(pools[rng.integers(len(pools))])) for _ in range(rng.integers(2, 12)))
        elif kind == 2:  # white space of every length between words
            pieces = [str(rng.choice(WORDS)) + str(rng.choice(SPACES)) * int(rng.integers(1, 5)) for _ in range(4)]
            text = "".join(pieces)
        else:  # noise from all of Unicode
            text = "".join(map(chr, rng.choice(points, rng.integers(1, 12))))
        found[text] = None
    return tuple(found)[:count]

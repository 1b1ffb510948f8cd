"""Strings that tokenizers stumble over, and tokenizer files small enough to read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SCRIPTS = (
    "The answer to the ultimate question of life, the universe, and everything is ",
    "Привет, например, мир! Ελληνικά γράμματα. עִבְרִית عَرَبِيّ فارسی",
    "自然语言处理,今天天气不错。日本語のテキスト、カタカナ。한국어 문장입니다",
    "हिन्दी भाषा தமிழ் ไทยภาษา မြန်မာ አማርኛ ქართული հայերեն",
    "🤗 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇯🇵 👍🏽 e\u0301 n\u0303 ﷽ \u200f\u202eabc\u202c \ufeffbom",
    "½ ²³ ① Ⅷ ٣٤٥ ४५६ 一二三 1234567890 3.14159e-10 0x1F 1,000,000",
    "def f(x: int) -> int:\n\treturn x**2  # square\r\n\r\nfor i in range(10):\n    print(f'{i!r}')\n",
    "it's I'LL we'Re he'd THEY'VE 'sup 'ſ K'\u017f don\u2019t ''s '''t",
    "a  b   c    d\n\n\n e \t\t f\r\n g\u00a0h\u3000i\u2028j\u0085k \n \n ",
    "<|im_start|><|eot_id|><|begin_of_text|></s><s>[INST]<|reserved_special_token_0|><|im_end|>",
    "\x00\x01\x02\x03\x07\x08\x0b\x0c\x0e\x1b\x1c\x1e\x1f\x7f\x80\x9f",
    "!\x04! a\x04b \x04's \x06\x06?? .\x13. \x14 \x16x \x1d\x1d !\x1d\n \x04. '\x04s 1\x041",
    "https://example.org/a?b=c&d=%20e#f user@mail.com C:\\dir\\file.txt $x^2$ \\frac{a}{b}",
)


def hard_strings(count: int, seed: int = 7) -> list[str]:
    """Return the sample strings, their tails and repetitions, and ``count`` random mixtures of them."""
    chance = random.Random(seed)
    pool = "".join(SCRIPTS)
    mixed = ["".join(chance.choices(pool, k=chance.randint(1, 40))) for _ in range(count)]
    joined = ["".join(chance.sample(SCRIPTS, 3)) for _ in range(40)]
    tails = [text[start:] for text in SCRIPTS for start in (1, 2, 5)]
    runs = [
        symbol * length for symbol in (" ", "\n", "a", "ab", "=", "🤗", "7", " \n", "\t ") for length in (2, 17, 333)
    ]
    return ["", *SCRIPTS, *joined, *tails, *runs, *mixed]


def own_source() -> str:
    """Return some thousand lines of real text: the sources of the package under test."""
    package = Path(__file__).parents[2] / "npllama"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(package.glob("*.py")))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_symbols() -> list[str]:
    """Return the characters of the byte-level alphabet, as the tokenizers library lists them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def tokenizer_document(merges: list[tuple[str, str]], **model: Any) -> dict[str, Any]:
    """Return a small ``tokenizer.json``: every byte, the merges, and one special token ``<|end|>``."""
    tokens = dict.fromkeys([*byte_symbols(), *(left + right for left, right in merges)])
    vocab = {token: index for index, token in enumerate(tokens)}
    end = {"id": len(vocab), "content": "<|end|>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    settings = {"dropout": None, "unk_token": None, "ignore_merges": False, "byte_fallback": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": dict(BYTE_LEVEL),
        "post_processor": None,
        "decoder": dict(BYTE_LEVEL),
        "model": {"type": "BPE", **settings, "vocab": vocab, "merges": [list(pair) for pair in merges], **model},
    }


MERGES = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("ð", "Ł")]


def small_files(**others: Any) -> dict[str, bytes]:
    """Return the files of a small tokenizer; each keyword names another JSON file and gives its content."""
    files = {"tokenizer.json": json.dumps(tokenizer_document(MERGES)).encode()}
    return files | {f"{name}.json": json.dumps(value).encode() for name, value in others.items()}

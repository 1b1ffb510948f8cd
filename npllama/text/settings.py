"""What the files beside a tokenizer say: beginning and end of a text, and the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from npllama.text.json_files import parse_object, tokenizer_error
from npllama.text.vocabulary import Vocabulary

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

#: Special tokens that a chat template may name.
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def with_settings(vocabulary: Vocabulary, files: Mapping[str, bytes], source: str) -> Vocabulary:
    """Add to a vocabulary what the files beside it say.

    - BOS: ``bos_token`` and ``add_bos_token`` of tokenizer_config.json, where they are there, win over what the
      tokenizer's own file says.
    - Stop ids: ``eos_token`` of tokenizer_config.json, else what the tokenizer's own file says; and every
      ``eos_token_id`` of generation_config.json.
    - Chat template: chat_template.jinja, else ``chat_template`` of tokenizer_config.json (of several the "default").

    Raises
    ------
    TokenizerError
        A value has the wrong type or names a token that does not exist.
    """
    config = _optional(files, TOKENIZER_CONFIG, source)
    generation = _optional(files, GENERATION_CONFIG, source)
    place = f"{source}:{TOKENIZER_CONFIG}"
    names = {key: text for key in _NAMES if (text := _token_text(config.get(key), key, place)) is not None}
    bos = _token_id(vocabulary, names.get("bos_token"), "bos_token", place)
    bos = vocabulary.bos if bos is None else bos
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = vocabulary.adds_bos
    if not isinstance(adds_bos, bool) or (adds_bos and bos is None):
        raise tokenizer_error(f"add_bos_token is {adds_bos!r}, but bos_token is {names.get('bos_token')!r}", place)
    if config.get("add_eos_token"):
        raise tokenizer_error("add_eos_token is true: a prompt that ends with EOS cannot be continued", place)
    stops = _ids(generation.get("eos_token_id"), f"{source}:{GENERATION_CONFIG}")
    eos = _token_id(vocabulary, names.get("eos_token"), "eos_token", place)
    own = vocabulary.stop_ids if eos is None else {eos}
    return replace(
        vocabulary,
        bos=bos,
        adds_bos=adds_bos,
        stop_ids=frozenset(stops).union(own),
        chat_template=_chat_template(files, config, source),
        template_names={**vocabulary.template_names, **names},
    )


def _optional(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    return parse_object(files[name], f"{source}:{name}") if name in files else {}


def _token_text(value: Any, key: str, place: str) -> str | None:
    """Return a token that is written as its text or as an object with ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise tokenizer_error(f"expected the text of a token, found {value!r}", place, key)
    return text


def _token_id(vocabulary: Vocabulary, text: str | None, key: str, place: str) -> int | None:
    if text is None:
        return None
    if text in vocabulary.special.ids:
        return vocabulary.special.ids[text]
    encoded = text.encode("utf-8", "replace")
    for index, token in vocabulary.tokens.items():
        if token == encoded:
            return index
    raise tokenizer_error(f"the token {text!r} is not in the vocabulary", place, key)


def _ids(value: Any, place: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise tokenizer_error(f"expected token ids, found {value!r}", place, "eos_token_id")
    return ids


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], source: str) -> str | None:
    if CHAT_TEMPLATE in files:
        try:
            return files[CHAT_TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as problem:
            raise tokenizer_error(f"not UTF-8 text at byte {problem.start}", f"{source}:{CHAT_TEMPLATE}") from None
    match config.get("chat_template"):
        case None | str() as template:
            return template
        case list() as templates:
            named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
            if isinstance(named.get("default"), str):
                return str(named["default"])
    raise tokenizer_error("expected a template or a list with one named 'default'", source, "chat_template")

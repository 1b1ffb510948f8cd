"""Dialogs as token ids: a checkpoint's own chat template, or the format of Llama 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npllama.errors import ChatTemplateError
from npllama.text.shield import Shield, without_surrogates
from npllama.text.tokenizer import Tokenizer

#: Role in a message -> role in a header of Llama 3.
_LLAMA3_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}

_HEADER, _HEADER_END, _TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

_KEYS = ("role", "content", "name", "tool_call_id")


def dialog_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Turn a dialog into the ids that a model continues.

    Text in a message is text: it never becomes a special token, whatever it spells. BOS comes first where the
    checkpoint's tokenizer adds it, and once, also if the template writes it.

    Parameters
    ----------
    tokenizer : Tokenizer
        With a chat template; or with the special tokens of Llama 3, whose format then serves.
    messages : sequence of mappings
        Each with "role" ("system", "user", "assistant" or "tool") and "content" (str); a tool's message also with
        "tool_call_id". The first that is no system message is the user's.
    add_generation_prompt : bool
        Whether the beginning of the assistant's answer comes last.

    Raises
    ------
    ChatTemplateError
        The dialog has another form (the message names the place, for example ``messages[1].role``), the template
        fails or refuses it, or there is no chat format.
    ResourceLimitError
        The template runs without end.

    Notes
    -----
    The format of Llama 3, as in Meta's llama-models (``ChatFormat.encode_dialog_prompt``): BOS, then for each message
    header start, role, header end, two line ends, content, end of turn. Content is not stripped, as the first release
    of Llama 3 did it; a tool's role is spelled "ipython".
    """
    check_dialog(messages)
    if tokenizer.chat_template is not None:
        return _from_template(tokenizer, tokenizer.chat_template, messages, add_generation_prompt)
    if not {_HEADER, _HEADER_END, _TURN_END} <= tokenizer.special_tokens.keys():
        raise ChatTemplateError(
            "this checkpoint has no chat template", remedy="Give a plain prompt, which is completed as it is."
        )
    return _llama3(tokenizer, messages, add_generation_prompt)


def check_dialog(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ChatTemplateError, with the place, unless the messages form a dialog."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise _bad("messages", f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise _bad("messages", "the list is empty")
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    for number, message in enumerate(messages):
        if message["role"] == "user":
            return
        if message["role"] != "system":
            raise _bad(f"messages[{number}].role", f"{message['role']!r} before any message of the user")


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, Mapping):
        raise _bad(place, f"expected an object with role and content, found {type(message).__name__}")
    for key in message:
        if key not in _KEYS:
            raise _bad(f"{place}.{key}", f"unknown key; known are {', '.join(_KEYS)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _LLAMA3_ROLES:
        raise _bad(f"{place}.role", f"found {role!r}, expected one of {', '.join(_LLAMA3_ROLES)}")
    required = ("role", "content", "tool_call_id") if role == "tool" else ("role", "content")
    for key in (*required, *message):
        if not isinstance(message.get(key), str):
            found = "nothing" if key not in message else type(message[key]).__name__
            raise _bad(f"{place}.{key}", f"expected text, found {found}")


def _bad(place: str, what: str) -> ChatTemplateError:
    return ChatTemplateError(f"{place}: {what}", remedy="Correct the dialog.")


def _llama3(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[int]:
    def header(role: str) -> list[int]:
        return [
            tokenizer.special_tokens[_HEADER],
            *tokenizer.encode(_LLAMA3_ROLES[role], bos=False),
            tokenizer.special_tokens[_HEADER_END],
            *tokenizer.encode("\n\n", bos=False),
        ]

    ids = tokenizer.encode("")
    for message in messages:
        ids += header(message["role"])
        ids += tokenizer.encode(message["content"], bos=False)
        ids.append(tokenizer.special_tokens[_TURN_END])
    return ids + header("assistant") if add_generation_prompt else ids


def _from_template(
    tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> list[int]:
    from npllama.text.chat_template import render  # jinja2 is needed from here on

    shield = Shield(tokenizer.special_tokens, [text for message in messages for text in message.values()])
    shielded = [
        # A role is one of four words: plain, since templates may build a special token around it.
        {key: text if key == "role" else shield.hide(text) for key, text in message.items()}
        for message in messages
    ]
    variables = {
        **tokenizer.template_names,
        "messages": shielded,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    pieces = tokenizer.split_special(render(without_surrogates(template), variables, shield))
    ids = tokenizer.encode_pieces(piece if isinstance(piece, int) else shield.show(piece) for piece in pieces)
    bos = tokenizer.encode("")
    return ids if ids[: len(bos)] == bos else bos + ids

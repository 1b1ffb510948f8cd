"""The tokenizer of a GGUF file, written out as the files that a Hugging Face folder would have.

A store's tokenizer folder then looks the same wherever the model came from, and one reader of tokenizers suffices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from npllama.checkpoint.gguf.byte_tokenizer import SCHEMES, Json, tokenizer_json
from npllama.checkpoint.gguf.piece_tokenizer import added_tokens_decoder, tokenizer_model
from npllama.checkpoint.gguf.tokenizer_metadata import TokenizerMetadata, TokenList


def tokenizer_files(metadata: Mapping[str, Any], file: str) -> dict[str, bytes]:
    """Write a GGUF file's tokenizer as files of a Hugging Face folder.

    Parameters
    ----------
    metadata : mapping
        The file's metadata, as `npllama.checkpoint.gguf.file.open_gguf` gives it.
    file : str
        The file's name, for messages.

    Returns
    -------
    dict of str to bytes
        File name -> content; empty when the file has no tokenizer.

        - ``tokenizer.json``, of byte-level BPE ("gpt2"), holds the vocabulary with every token but the unused ones,
          the merges, the pre-tokenizer that ``tokenizer.ggml.pre`` names, and as added tokens the control tokens
          ("special") and the user-defined ones. Its post-processor puts BOS (and EOS) where the file wants them.
        - ``tokenizer.model``, of SentencePiece BPE ("llama"), holds tokens, scores and types, and whether a space is
          put before a text.
        - ``tokenizer_config.json`` holds BOS, EOS, padding and unknown token as text, whether BOS and EOS are added,
          the chat template, and of Phi-3 which tokens take the white space behind them with them.
        - ``generation_config.json`` holds the ids: BOS, padding, and as ``eos_token_id`` the list of those that end a
          reply (EOS, end of turn and end of message, as far as the file names them).

    Raises
    ------
    UnsupportedError
        A tokenizer of another kind, an unknown pre-tokenizer, or scores that say nothing.
    TokenizerError
        Vocabulary, merges, types and ids contradict each other.

    Notes
    -----
    Where ``tokenizer.ggml.add_bos_token`` is absent, BOS is added for SentencePiece and for Llama 3's pre-tokenizer and
    for no other, which is what llama.cpp does (``llama_vocab::impl::load`` in its ``src/llama-vocab.cpp``).
    """
    reader = TokenizerMetadata(metadata, file)
    kind = reader.optional("model", str)
    if kind is None:
        return {}
    if kind == "llama":
        content, vocabulary = tokenizer_model(reader, reader.vocabulary())
        config = _tokenizer_config(reader, vocabulary, adds_bos=True)
        config["added_tokens_decoder"] = added_tokens_decoder(reader, vocabulary)
        main = {"tokenizer.model": content}
    elif kind == "gpt2":
        pre = reader.optional("pre", str)
        scheme = SCHEMES.get(pre or "")
        if scheme is None:
            raise reader.unsupported(
                f"the pre-tokenizer is {pre!r}", f"Pre-tokenizers that are read: {', '.join(SCHEMES)}."
            )
        vocabulary = reader.vocabulary()
        config = _tokenizer_config(reader, vocabulary, adds_bos=scheme.add_bos)
        main = {"tokenizer.json": _dump(tokenizer_json(reader, vocabulary, scheme))}
    else:
        raise reader.unsupported(
            f"the tokenizer is of the kind {kind!r}",
            "Byte-level BPE ('gpt2') and SentencePiece BPE ('llama') are read.",
        )
    return {
        **main,
        "tokenizer_config.json": _dump(config),
        "generation_config.json": _dump(_generation_config(reader, vocabulary)),
    }


def _dump(document: Json) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def _tokenizer_config(reader: TokenizerMetadata, vocabulary: TokenList, *, adds_bos: bool) -> Json:
    ends = reader.added_ends(vocabulary, adds_bos=adds_bos)
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": "bos" in ends,
        "add_eos_token": "eos" in ends,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        index = reader.token_id(name, vocabulary)
        if index is not None:
            config[f"{key}_token"] = vocabulary.tokens[index]
    template = reader.chat_template()
    if template is not None:
        config["chat_template"] = template
    return config


def _generation_config(reader: TokenizerMetadata, vocabulary: TokenList) -> Json:
    ids = {name: reader.token_id(name, vocabulary) for name in ("bos", "padding", "eos", "eot", "eom")}
    config: Json = {}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if ids[name] is not None:
            config[key] = ids[name]
    stops = sorted({index for name in ("eos", "eot", "eom") if (index := ids[name]) is not None})
    if stops:
        config["eos_token_id"] = stops
    return config

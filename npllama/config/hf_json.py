"""Hugging Face's ``config.json``."""

from __future__ import annotations

from npllama.config.hf import gpt, llama, olmo, qwen
from npllama.config.keys import Keys
from npllama.config.model_config import ModelConfig, model_config
from npllama.errors import ConfigError, UnsupportedError
from npllama.strict_json import parse_object

#: ``model_type`` -> how to read it.
_FAMILIES = {**llama.FAMILIES, **qwen.FAMILIES, **olmo.FAMILIES, **gpt.FAMILIES}

#: Keys of any family that do not touch the forward pass.
_HARMLESS = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_length model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict task_specific_params
    tokenizer_class torch_dtype transformers.js_config transformers_version unk_token_id unsloth_version use_cache
    _attn_implementation_autoset _model_name_or_path _name_or_path
    """.split()
)


def from_hf_json(text: bytes, file: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read a Hugging Face ``config.json``.

    Parameters
    ----------
    text : bytes
        The document.
    file : str
        Its name, for messages.

    Returns
    -------
    config : ModelConfig
    notes : tuple of str
        Assumptions that the file left open: none, for what it leaves out has the family's defaults.

    Raises
    ------
    ConfigError
        Missing, unknown, mistyped or impossible values.
    UnsupportedError
        A family that npllama does not know, or a setting that it would get wrong.
    """
    values = parse_object(text, error=ConfigError, file=file)
    name = values.get("model_type")
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedError(
            f"model_type is {name!r}", file=file, remedy=f"Supported families: {', '.join(_FAMILIES)}."
        )
    keys = Keys({**family.defaults, **values}, file)
    keys.must_be("quantization_config", [], "a quantised release")
    config = model_config(file, family=name, **family.read(keys))
    keys.finish(_HARMLESS | family.harmless)
    return config, ()

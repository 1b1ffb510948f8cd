"""The tokenizer's files beside a checkpoint's weights."""

from __future__ import annotations

from npllama.checkpoint.source import file_names, join, read_file

META = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"

_COMPANIONS = (
    "added_tokens.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: Where Hugging Face folders of Meta's models keep Meta's own files.
_ORIGINAL = "original"


def tokenizer_files(folder: str, names: list[str], prefer: str) -> dict[str, bytes]:
    """Read what belongs to the tokenizer, under the names that a store keeps.

    Parameters
    ----------
    folder : str
        The checkpoint's folder, local or remote.
    names : list of str
        What is in it.
    prefer : str
        ``META`` or ``HUGGING_FACE``: which of two tokenizers counts.

    Returns
    -------
    dict of str to bytes
        Empty where there is no tokenizer, whatever else is there. Beside a ``tokenizer.model`` in a Hugging Face folder
        (SentencePiece's: Llama 1 and 2, Mistral, Phi-3), as beside a ``tokenizer.json``, other files add to it; Meta's
        stands alone.
    """
    original = join(folder, _ORIGINAL)
    in_original = _ORIGINAL in names and META in file_names(original)
    if in_original and (prefer == META or HUGGING_FACE not in names):
        return {META: read_file(join(original, META))}
    chosen = next((name for name in (prefer, HUGGING_FACE, META) if name in names), None)
    if chosen is None:
        return {}
    companions = () if prefer == META == chosen else _COMPANIONS
    return {name: read_file(join(folder, name)) for name in (chosen, *companions) if name in names}

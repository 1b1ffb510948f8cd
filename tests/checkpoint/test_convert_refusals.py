"""What a conversion refuses: bad models before anything is written, bad numbers, and folders that are not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.store.folder import Store, verify_store
from npllama.errors import (
    ConfigMismatchError,
    CorruptDataError,
    DestinationExistsError,
    NpllamaError,
    ParameterError,
    UnsafeFileError,
    UnsupportedError,
)
from tests.checkpoint.tiny import CONFIG, checkpoint, ref, stored, tree

# --- what is refused, before anything is written -------------------------------------------------------------------


def refused(folder: Path, error: type[NpllamaError], match: str, *, dtype: str = "bf16", **changes: Any) -> None:
    with pytest.raises(error, match=match):
        convert_checkpoint(checkpoint(**changes), folder / "m", dtype=dtype)
    assert list(folder.iterdir()) == []


def test_an_unknown_dtype_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    refused(tmp_path, ParameterError, r"'fp8'.*bf16, f32, int8, int4", dtype="fp8")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    values = {name: array for name, array in stored().items() if ".wq." not in name}
    refused(tmp_path, ConfigMismatchError, r"2 tensors are missing: layers.0.attention.wq", values=values)


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    values = {**stored(), "layers.0.attention.wq.bias": np.zeros(8, np.float32)}
    refused(tmp_path, ConfigMismatchError, "1 tensors are unknown: layers.0.attention.wq.bias", values=values)


def test_wrong_shapes_are_shown_with_the_expected_ones(tmp_path: Path) -> None:
    values = {**stored(), "norm.weight": np.zeros(9, np.float32)}
    refused(tmp_path, ConfigMismatchError, r"norm.weight is \(9,\), expected \(8,\)", values=values)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = {**checkpoint().tensors, "norm.weight": ref("norm.weight", np.zeros(8, "<i8"), "int64")}
    refused(tmp_path, UnsupportedError, "norm.weight has the dtype int64", tensors=tensors)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", ".hidden"])
def test_a_tokenizer_file_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    refused(tmp_path, UnsafeFileError, "tokenizer", tokenizer={name: b""})


def test_a_remote_destination_is_refused() -> None:
    with pytest.raises(ParameterError, match="local disk"):
        convert_checkpoint(checkpoint(), "gs://bucket/model")


def test_the_root_of_the_disk_is_refused() -> None:
    with pytest.raises(ParameterError, match="name of a folder"):
        convert_checkpoint(checkpoint(), "/")


@pytest.mark.parametrize("dtype", ["bf16", "f32", "int8", "int4"])
def test_nan_and_infinities_are_counted_and_located(tmp_path: Path, dtype: str) -> None:
    values = stored()
    values["layers.1.feed_forward.w2.weight"][5, 3] = np.nan
    values["layers.1.feed_forward.w2.weight"][5, 7:9] = np.inf
    with pytest.raises(CorruptDataError) as caught:
        convert_checkpoint(checkpoint(values), tmp_path / "m", dtype=dtype)
    assert "layers.1.feed_forward.w2.weight has 1 NaN and 2 infinite numbers, the first at [5, 3]" in str(caught.value)
    assert "--allow-nan" in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_is_too_large_for_a_group_counts_as_infinite(tmp_path: Path, dtype: str) -> None:
    values = stored()
    values["output.weight"][1, 2] = 3e38
    with pytest.raises(CorruptDataError, match=r"0 NaN and 1 infinite numbers, the first at \[1, 2\]"):
        convert_checkpoint(checkpoint(values), tmp_path / "m", dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_allowed_nan_makes_its_group_nan_and_never_a_number(tmp_path: Path, dtype: str) -> None:
    values = stored()
    values["output.weight"][1, 2] = np.inf
    store = Store.open(convert_checkpoint(checkpoint(values), tmp_path / "m", dtype=dtype, allow_nan=True))
    found = store.tensor("output.weight").numbers()
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_allow_nan_lets_them_pass(tmp_path: Path, dtype: str) -> None:
    values = stored()
    values["norm.weight"].view(np.uint32)[:3] = [0x7FA00001, 0xFF800000, 0x7FFFFFFF]  # a signalling NaN, -inf, a NaN
    store = Store.open(convert_checkpoint(checkpoint(values), tmp_path / "m", dtype=dtype, allow_nan=True))
    found = store.tensor("norm.weight").numbers()
    np.testing.assert_array_equal(found[:3], [np.nan, -np.inf, np.nan])


def test_what_only_overflows_in_bfloat16_is_found_too(tmp_path: Path) -> None:
    values = stored()
    values["norm.weight"][2] = np.finfo(np.float32).max
    with pytest.raises(CorruptDataError, match=r"0 NaN and 1 infinite numbers, the first at \[2\]"):
        convert_checkpoint(checkpoint(values), tmp_path / "m")
    convert_checkpoint(checkpoint(values), tmp_path / "m", dtype="f32")


def test_a_nan_allowed_once_is_not_taken_over_by_a_strict_run(tmp_path: Path) -> None:
    values = stored()
    values["tok_embeddings.weight"][0, 0] = np.nan

    def stop(what: str, done: int, total: int) -> None:
        if done > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint(values), tmp_path / "m", allow_nan=True, progress=stop)
    assert (tmp_path / "m.partial" / "weights" / "tok_embeddings.weight.npy").exists()
    with pytest.raises(CorruptDataError, match="1 NaN"):
        convert_checkpoint(checkpoint(values), tmp_path / "m")


# --- destinations --------------------------------------------------------------------------------------------------


def test_an_existing_model_is_refused_without_force(tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    before = tree(folder)
    with pytest.raises(DestinationExistsError, match="--force"):
        convert_checkpoint(checkpoint(), folder, dtype="f32")
    assert tree(folder) == before


def test_force_replaces_a_model(tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    convert_checkpoint(checkpoint(), folder, dtype="f32", force=True)
    assert Store.open(folder).manifest["dtype"] == "float32"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [None, b"{}", b"[", b'{"producer": "somebody else 1.0"}'])
def test_force_never_replaces_another_folder(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    before = tree(folder)
    with pytest.raises(DestinationExistsError, match="not a model folder"):
        convert_checkpoint(checkpoint(), folder, force=True)
    assert tree(folder) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(DestinationExistsError, match="not a model folder"):
        convert_checkpoint(checkpoint(), tmp_path / "m", force=True)


def test_an_empty_folder_may_become_the_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert verify_store(convert_checkpoint(checkpoint(), tmp_path / "m")).problems == ()


def test_a_stranger_s_partial_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "m.partial" / "weights").mkdir(parents=True)
    (tmp_path / "m.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(DestinationExistsError, match="not an interrupted conversion"):
        convert_checkpoint(checkpoint(), tmp_path / "m")
    assert (tmp_path / "m.partial" / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["with space", "模型", "new\nline", "m" * 240])
def test_awkward_folder_names_work(tmp_path: Path, name: str) -> None:
    assert verify_store(convert_checkpoint(checkpoint(), tmp_path / name)).problems == ()


def test_a_destination_through_a_link_is_written_where_the_link_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert_checkpoint(checkpoint(), tmp_path / "link" / "m")
    assert Store.open(tmp_path / "real" / "m").config == CONFIG

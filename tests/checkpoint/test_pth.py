"""A .pth file must give exactly torch's numbers or a typed error: never a wrong number, an import, or much memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npllama.checkpoint.pth import file as pth
from npllama.checkpoint.pth.file import open_pth
from npllama.dtypes import STORAGE
from npllama.errors import (
    CorruptDataError,
    NpllamaError,
    ResourceLimitError,
    UnsupportedError,
)
from tests.checkpoint.archives import (
    STORAGE_NAMES,
    Raw,
    View,
    call,
    symbol,
    write_checkpoint,
)
from tests.checkpoint.pth_files import opened, read_all, same, write

RNG = np.random.default_rng(7)


class TestNumbers:
    @pytest.mark.parametrize("dtype", sorted(STORAGE_NAMES))
    def test_every_dtype_is_read_bit_by_bit(self, tmp_path: Path, dtype: str) -> None:
        array = RNG.integers(0, 2, (3, 5)).astype(STORAGE[dtype])
        path = write_checkpoint(tmp_path / "x.pth", {"w": array}, bfloat16=dtype == "bfloat16")
        with opened(path) as file:
            assert file.tensors["w"].dtype == dtype
            assert file.tensors["w"].where == "x.pth:archive/data/0"
            assert file.tensors["w"].nbytes == array.nbytes
        assert same(read_all(path), {"w": array})

    def test_views_of_one_storage_are_read_right(self, tmp_path: Path) -> None:
        base = np.arange(48, dtype=np.float32).reshape(6, 8)
        views = {
            "whole": (base, 0, (8, 1)),
            "rows": (base[1:3], 8, (8, 1)),
            "transposed": (base.T, 0, (1, 8)),
            "sliced": (base[::2, 1::3], 1, (16, 3)),
            "column": (base[:, 2], 2, (8,)),
            "scalar": (base[5, 7], 47, ()),
            "empty": (base[:0], 48, (8, 1)),
        }
        path = write(
            tmp_path / "x.pth",
            {name: View("0", 48, array.shape, stride, offset) for name, (array, offset, stride) in views.items()},
            {"0": base.tobytes()},
        )
        assert same(read_all(path), {name: array for name, (array, _, _) in views.items()})

    def test_rows_are_read_block_by_block(self, tmp_path: Path) -> None:
        array = RNG.standard_normal((10, 3)).astype(np.float32)
        views = {"a": View("0", 30, (10, 3), (3, 1)), "b": View("0", 30, (3, 10), (1, 3))}
        with opened(write(tmp_path / "x.pth", views, {"0": array.tobytes()})) as file:
            for name, whole in (("a", array), ("b", array.T)):
                ref = file.tensors[name]
                blocks = [ref.read_rows(i, min(i + 4, ref.n_rows)) for i in range(0, ref.n_rows, 4)]
                ref.verify()
                np.testing.assert_array_equal(np.concatenate(blocks), whole)

    def test_equal_bytes_have_equal_aliases_and_only_they(self, tmp_path: Path) -> None:
        view = View("0", 12, (3, 4), (4, 1))
        values = {
            "a": view,
            "same": view,
            "shape": View("0", 12, (4, 3), (3, 1)),
            "offset": View("0", 12, (2, 4), (4, 1), 4),
            "storage": View("1", 12, (3, 4), (4, 1)),
        }
        with opened(write(tmp_path / "x.pth", values, {"0": bytes(48), "1": bytes(48)})) as file:
            alias = {name: ref.alias for name, ref in file.tensors.items()}
        assert alias["a"] == alias["same"]
        assert len(set(alias.values())) == 4

    @pytest.mark.parametrize(
        "wrapped",
        [
            lambda tensor: call("torch._utils", "_rebuild_parameter", tensor, True, {}),
            lambda tensor: call("torch._utils", "_rebuild_parameter_with_state", tensor, True, {}, {"x": 1}),
            lambda tensor: call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                symbol("torch._utils", "_rebuild_parameter"),
                symbol("torch.nn.parameter", "Parameter"),
                (tensor, True, {}),
                {},
            ),
        ],
    )
    def test_parameters_are_their_tensors(self, tmp_path: Path, wrapped: Any) -> None:
        path = write(tmp_path / "x.pth", {"w": wrapped(View("0", 2, (2,), (1,)))}, {"0": np.float32([1, 2]).tobytes()})
        assert same(read_all(path), {"w": np.float32([1, 2])})

    def test_a_gpus_tensors_are_read(self, tmp_path: Path) -> None:
        view = View("0", 2, (2,), (1,), storage="torch.cuda HalfStorage", location="cuda:3")
        assert same(read_all(write(tmp_path / "x.pth", {"w": view}, {"0": bytes(4)})), {"w": np.zeros(2, np.float16)})

    @pytest.mark.parametrize("key", ["model", "state_dict", "module"])
    def test_a_nested_state_dict_is_found_and_reported(self, tmp_path: Path, key: str) -> None:
        path = write_checkpoint(tmp_path / "x.pth", {"w": np.ones(3, np.float32)}, wrap=key)
        with opened(path) as file:
            assert list(file.tensors) == ["w"]
            assert file.notes == (f"the tensors are nested under {key!r}",)

    def test_what_is_no_tensor_is_passed_over_and_reported(self, tmp_path: Path) -> None:
        value = {"w": View("0", 1, (1,), (1,)), "step": 7, "size": call("torch", "Size", (2,)), "n": None}
        with opened(write(tmp_path / "x.pth", value, {"0": bytes(4)})) as file:
            assert list(file.tensors) == ["w"]
            assert file.notes == ("3 entries that are not tensors were passed over: step, size, n",)


def tensor(**changes: Any) -> dict[str, View]:
    """A state dict with one honest tensor of a storage with 12 floats, except for the changes."""
    return {"w": View(**{"key": "0", "numel": 12, "shape": (3, 4), "stride": (4, 1), **changes})}


def rebuilt(name: str) -> dict[str, Raw]:
    return {"w": call("torch._utils", name, 1)}


BIG = 2**62
V3 = call("torch._utils", "_rebuild_tensor_v3", 0, 0, (2,), (1,), False, {}, symbol("torch", "float8_e4m3fn"))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (tensor(key="../version"), CorruptDataError, "has the key '../version', expected digits"),
        (tensor(key=0), CorruptDataError, "expected digits"),
        (tensor(key="9"), CorruptDataError, "storage '9' is not in the archive"),
        (tensor(location=3), CorruptDataError, "expected digits"),
        (tensor(numel=13), CorruptDataError, "has 48 bytes, 13 of float32 are declared"),
        (tensor(numel=11), CorruptDataError, "has 48 bytes, 11 of float32 are declared"),
        (tensor(numel=-12), CorruptDataError, "has -12 elements"),
        (tensor(numel=True), CorruptDataError, "has True elements"),
        (tensor(storage="torch DoubleStorage"), CorruptDataError, "has 48 bytes, 12 of float64 are declared"),
        (tensor(offset=1), CorruptDataError, "reaches element 13 of a storage of 12"),
        (tensor(offset=-1), CorruptDataError, "not non-negative integers"),
        (tensor(shape=(3, -4)), CorruptDataError, "not non-negative integers"),
        (tensor(stride=(-4, 1)), CorruptDataError, "not non-negative integers"),
        (tensor(shape=(True, 4)), CorruptDataError, "not non-negative integers"),
        (tensor(shape=(3.0, 4)), CorruptDataError, "not non-negative integers"),
        (tensor(shape=[3, 4]), CorruptDataError, "not non-negative integers"),
        (tensor(shape=(3, 4, 1)), CorruptDataError, "do not fit together"),
        (tensor(shape=(1,) * 9, stride=(1,) * 9), CorruptDataError, "do not fit together"),
        (tensor(shape=(2**40, 2**40)), CorruptDataError, "do not fit together"),
        (tensor(shape=(2, BIG, 0), stride=(1, 1, 1), offset=13), CorruptDataError, "reaches element 13"),
        (tensor(stride=(BIG, BIG)), CorruptDataError, "of a storage of 12"),
        (tensor(shape=(4, 4)), CorruptDataError, "reaches element 16 of a storage of 12"),
        (tensor(stride=(0, 1)), UnsupportedError, "repeats or interleaves"),
        (tensor(stride=(1, 1)), UnsupportedError, "repeats or interleaves"),
        (tensor(more=({"neg": True},)), UnsupportedError, "negated or conjugated"),
        (tensor(more=({"conj": True},)), UnsupportedError, "negated or conjugated"),
        (tensor(more=(None,)), UnsupportedError, "negated or conjugated"),
        (tensor(more=({}, {})), CorruptDataError, "8 arguments"),
        (tensor(hooks={1: 2}), CorruptDataError, "backward hooks"),
        (tensor(storage="torch ComplexFloatStorage"), UnsupportedError, r"stored as torch\.ComplexFloatStorage"),
        (tensor(storage="torch QInt8Storage"), UnsupportedError, r"stored as torch\.QInt8Storage"),
        (tensor(storage="torch.storage UntypedStorage"), UnsupportedError, r"torch\.storage\.UntypedStorage"),
        (tensor(storage="torch float32"), CorruptDataError, "has no type"),
        ({"w": V3}, UnsupportedError, r"stored as torch\.float8_e4m3fn"),
        (rebuilt("_rebuild_sparse_tensor"), UnsupportedError, "is sparse"),
        (rebuilt("_rebuild_qtensor"), UnsupportedError, "quantised by torch"),
        (rebuilt("_rebuild_tensor"), UnsupportedError, r"torch before 0\.4"),
        (rebuilt("_rebuild_tensor_v2"), CorruptDataError, "1 arguments"),
        (rebuilt("_rebuild_parameter"), UnsupportedError, "unknown kind"),
        (
            {**tensor(), "x": View("0", 48, (48,), (1,), storage="torch CharStorage")},
            CorruptDataError,
            "is both float32 and int8",
        ),
        ({0: tensor()["w"]}, UnsupportedError, "a tensor has the key 0"),
        ([tensor()["w"]], UnsupportedError, "does not hold a dict"),
        (tensor()["w"], UnsupportedError, "does not hold a dict"),
        ({}, UnsupportedError, "the dict has no tensors"),
        ({"optimizer": tensor()}, UnsupportedError, "the dict has no tensors"),
        ({"model": tensor(), "module": tensor()}, UnsupportedError, "found 'model', 'module'"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(
    tmp_path: Path, value: Any, error: type[NpllamaError], words: str
) -> None:
    path = write(tmp_path / "x.pth", value, {"0": bytes(48)})
    with pytest.raises(error, match=words) as caught:
        open_pth(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "reference", [Raw(b"NQ"), Raw(b")Q"), Raw(b"(X\7\0\0\0storageNNNNtQ"), Raw(b"(X\6\0\0\0moduleNNNNtQ"), Raw(b"N")]
)
def test_a_storage_that_is_not_described_by_five_values_is_refused(tmp_path: Path, reference: Raw) -> None:
    value = {"w": call("torch._utils", "_rebuild_tensor_v2", reference, 0, (1,), (1,), False, {})}
    with pytest.raises(CorruptDataError):
        open_pth(write(tmp_path / "x.pth", value, {}))


def test_a_tensor_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    items = b"".join(Raw(b"X\1\0\0\0w").code + call("torch", "Size", (1,)).code for _ in range(2))
    with pytest.raises(CorruptDataError, match="the key 'w' appears twice"):
        open_pth(write(tmp_path / "x.pth", Raw(b"}(" + items + b"u"), {}))


def test_another_format_under_the_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnsupportedError, match="this is a safetensors file"):
        open_pth(path)


def test_an_enormous_pickle_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pth, "_MAX_PROGRAM", 10)
    with pytest.raises(ResourceLimitError, match="at most 10"):
        open_pth(write_checkpoint(tmp_path / "x.pth", {"w": np.ones(3, np.float32)}))


@pytest.mark.torch
class TestAgainstTorch:
    @staticmethod
    def numpy_of(tensor: Any) -> np.ndarray:
        import torch

        tensor = tensor.detach().contiguous()
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        return bits.numpy().reshape(tuple(tensor.shape))  # type: ignore[no-any-return]

    def test_a_corpus_of_tensor_kinds_is_read_as_torch_wrote_it(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        base = torch.randn(6, 8)
        attributed = torch.randn(3)
        attributed.note = "x"
        state = {
            **{name: torch.randn(3, 4).to(getattr(torch, name)) for name in "float64 float32 float16 bfloat16".split()},
            **{name: torch.arange(7).to(getattr(torch, name)) for name in "int64 int32 int16 int8 uint8".split()},
            "bool": torch.tensor([True, False]),
            "base": base,
            "transposed": base.t(),
            "rows": base[1:3],
            "column": base[:, 2],
            "sliced": base[::2, 1::3],
            "permuted": torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1).bfloat16(),
            "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 4),
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
            "attributed": attributed,
            "tied": base,
        }
        expected = {name: self.numpy_of(tensor) for name, tensor in state.items()}
        module = torch.nn.Linear(3, 2)
        nested = {"model": module.state_dict(), "step": 3, "shape": torch.Size([2]), "device": torch.device("cpu")}
        for path in (tmp_path / "plain.pth", tmp_path / "ünï.pth"):
            torch.save(state, path)
            assert same(read_all(path), expected)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        (tmp_path / "buffer.pth").write_bytes(buffer.getvalue())
        assert same(read_all(tmp_path / "buffer.pth"), expected)
        torch.save(nested, tmp_path / "nested.pth")
        assert same(
            read_all(tmp_path / "nested.pth"), {name: self.numpy_of(t) for name, t in module.state_dict().items()}
        )

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda torch: torch.zeros(3).expand(4, 3), "repeats or interleaves"),
            (lambda torch: torch.eye(2).to_sparse(), "is sparse"),
            (lambda torch: torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
            (lambda torch: torch.zeros(2, dtype=torch.uint16), "uint16"),
            (lambda torch: torch.zeros(2, dtype=torch.complex64), "ComplexFloatStorage"),
            (lambda torch: torch.zeros(2, dtype=torch.complex64).conj().imag, "negated or conjugated"),
            (lambda torch: torch.zeros(2, device="meta"), "meta tensor"),
        ],
    )
    def test_other_kinds_of_tensors_are_refused_by_name(self, tmp_path: Path, make: Any, words: str) -> None:
        torch = pytest.importorskip("torch")
        torch.save({"layers.0.w": make(torch)}, tmp_path / "x.pth")
        with pytest.raises(UnsupportedError, match=f"'layers.0.w'.*{words}"):
            open_pth(tmp_path / "x.pth")

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_random_state_dicts_survive_the_round_trip(self, tmp_path: Path, data: st.DataObject) -> None:
        torch = pytest.importorskip("torch")
        state: dict[str, Any] = {}
        for index in range(data.draw(st.integers(1, 4))):
            shape = data.draw(st.lists(st.integers(1, 6), max_size=4))
            dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]))
            base = (torch.randn(shape) * 100).to(dtype)
            state[f"base.{index}"] = base
            for view in range(data.draw(st.integers(0, 3))):
                order = data.draw(st.permutations(range(len(shape))))
                cut = tuple(
                    slice(data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)), data.draw(st.integers(1, 3)))
                    for n in shape
                )
                state[f"view.{index}.{view}"] = base[cut].permute(order)
        torch.save(state, tmp_path / "x.pth")
        assert same(read_all(tmp_path / "x.pth"), {name: self.numpy_of(tensor) for name, tensor in state.items()})

    def test_what_is_accepted_after_damage_is_what_torch_reads(self, tmp_path: Path) -> None:
        """Where torch cannot see the damage, we must; where both read, they must agree."""
        torch = pytest.importorskip("torch")
        path = tmp_path / "x.pth"
        torch.save({"w": torch.arange(8.0), "v": torch.ones(2, 2).t()}, path)
        content, honest = path.read_bytes(), read_all(path)
        for position in range(0, len(content), 2):
            damaged = bytearray(content)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            try:
                found = read_all(path)
            except NpllamaError:
                continue
            assert same(found, honest), position
            theirs = torch.load(path, weights_only=True)
            assert same(found, {name: self.numpy_of(tensor) for name, tensor in theirs.items()}), position

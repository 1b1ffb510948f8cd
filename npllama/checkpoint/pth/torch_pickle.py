"""What the values in torch's data.pkl mean: which of them are tensors, and where each tensor's numbers lie.

torch writes a tensor as a call of ``torch._utils._rebuild_tensor_v2`` with a storage (a persistent id), an offset, a
size and a stride, all counted in elements (``torch/_utils.py``, ``torch/_tensor.py``, ``torch/storage.py``). Nothing
here is called: the arguments are checked and kept as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from npllama.checkpoint.pth.pickle_values import Call, PersistentId, Role, Symbol, Symbols
from npllama.checkpoint.pth.strided import is_disjoint, span
from npllama.dtypes import STORAGE
from npllama.errors import CorruptDataError, NpllamaError, UnsupportedError

_STORAGE_DTYPES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_OTHER_STORAGES: Final = """
    ComplexFloatStorage ComplexDoubleStorage QInt8Storage QInt32Storage QUInt8Storage QUInt4x2Storage QUInt2x4Storage
""".split()
_DTYPES: Final = """
    float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 complex32 complex64
    complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 qint8 qint32
    quint8 quint4x2 quint2x4 bits8 bits16 bits1x8 bits2x4 bits4x2
""".split()

_STRIDED: Final = ("torch._utils", "_rebuild_tensor_v2")
#: Calls that wrap another tensor: its arguments hold it.
_PARAMETERS: Final = (("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state"))
_SUBCLASSED: Final = ("torch._tensor", "_rebuild_from_type_v2")
#: Calls that make tensors of a kind that is not read.
_OTHER_TENSORS: Final = {
    ("torch._utils", "_rebuild_tensor"): "saved by a torch before 0.4",
    ("torch._utils", "_rebuild_sparse_tensor"): "sparse",
    ("torch._utils", "_rebuild_qtensor"): "quantised by torch",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "a meta tensor without numbers",
    ("torch._utils", "_rebuild_nested_tensor"): "a nested tensor",
    ("torch._utils", "_rebuild_wrapper_subclass"): "of a tensor subclass without a storage",
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): "an array of another device",
}
_EXTENDED: Final = ("torch._utils", "_rebuild_tensor_v3")
_TENSORS: Final = frozenset({_STRIDED, _EXTENDED, *_PARAMETERS, *_OTHER_TENSORS})

_OPAQUE_CALLS: Final = (
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("_codecs", "encode"),
    ("__builtin__", "set"),
    ("builtins", "set"),
)
_OPAQUE_NAMES: Final = (
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("torch", "per_tensor_affine"),
    ("torch", "per_channel_affine"),
)

#: Every name that a checkpoint's pickle may mention.
SYMBOLS: Final[Symbols] = {
    ("collections", "OrderedDict"): Role.MAPPING,
    **dict.fromkeys((*_TENSORS, _SUBCLASSED, *_OPAQUE_CALLS), Role.FUNCTION),
    **dict.fromkeys(_OPAQUE_NAMES, Role.NAME),
    **{
        (module, name): Role.NAME for module in ("torch", "torch.cuda") for name in (*_STORAGE_DTYPES, *_OTHER_STORAGES)
    },
    **{("torch", name): Role.NAME for name in _DTYPES},
}

_NESTED_UNDER: Final = ("model", "state_dict", "module")
_KEY: Final = re.compile(r"[0-9]{1,9}")
_MAX_RANK: Final = 8
_MAX_ELEMENTS: Final = 1 << 48


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's numbers lie.

    Attributes
    ----------
    key : str
        Storage, as in the record name ``data/KEY``.
    dtype : str
        Logical dtype.
    offset : int
        Elements before the first one, in the storage.
    shape, stride : tuple of int
        Lengths of the axes, and elements from one index to the next.
    """

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class StateDict:
    """Finds the tensors of a pickled value.

    Parameters
    ----------
    root : object
        What `npllama.checkpoint.pth.pickle_vm.run` returned.
    sizes : mapping of str to int
        Bytes of every storage record, by key.
    file, record : str
        Place for messages.

    Attributes
    ----------
    tensors : dict of str to StoredTensor
        In the order of the file.
    notes : tuple of str
        What a person should be told: where the tensors were found, what was passed over.

    Raises
    ------
    CorruptDataError
        A tensor that contradicts itself or its storage's record.
    UnsupportedError
        No state dict, or tensors of a kind that is not read, by name.
    """

    def __init__(self, root: Any, sizes: Mapping[str, int], *, file: str, record: str) -> None:
        self._sizes = sizes
        self._file = file
        self._record = record
        self._dtypes: dict[str, str] = {}
        chosen, notes = self._choose(root)
        others = [str(name) for name, value in chosen.items() if not _is_tensor(value)]
        if others:
            listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            notes.append(f"{len(others)} entries that are not tensors were passed over: {listed}")
        self.tensors = {name: self._stored(name, value) for name, value in chosen.items() if _is_tensor(value)}
        self.notes = tuple(notes)

    def _corrupt(self, name: str, message: str, call: Call | PersistentId) -> NpllamaError:
        return CorruptDataError(
            f"tensor {name!r}: {message}",
            file=self._file,
            record=self._record,
            offset=call.offset,
            remedy="The file is damaged, or was not written by torch.save.",
        )

    def _unsupported(self, message: str, offset: int | None = None) -> NpllamaError:
        return UnsupportedError(
            message,
            file=self._file,
            record=self._record,
            offset=offset,
            remedy="Load it with torch and save a dict of plain float tensors.",
        )

    def _choose(self, root: Any) -> tuple[dict[Any, Any], list[str]]:
        """Return the dict that holds the tensors: the top one, or the one that is known to hold a state dict."""
        if not isinstance(root, dict):
            raise self._unsupported("the file does not hold a dict of tensors")
        if _has_tensors(root):
            return root, []
        nested = [key for key in _NESTED_UNDER if isinstance(root.get(key), dict) and _has_tensors(root[key])]
        if len(nested) != 1:
            found = ", ".join(map(repr, nested)) or "none"
            raise self._unsupported(
                f"the dict has no tensors, and not exactly one of {', '.join(_NESTED_UNDER)} has any (found {found})"
            )
        return root[nested[0]], [f"the tensors are nested under {nested[0]!r}"]

    def _stored(self, name: Any, call: Call) -> StoredTensor:
        if not isinstance(name, str):
            raise self._unsupported(f"a tensor has the key {name!r}, expected a name", call.offset)
        function, arguments = _unwrap(call)
        if function == _EXTENDED:
            dtype = arguments[6] if len(arguments) > 6 else "an unknown dtype"
            raise self._unsupported(f"tensor {name!r} is stored as {dtype}", call.offset)
        if function != _STRIDED:
            what = _OTHER_TENSORS.get(function, "of an unknown kind")
            raise self._unsupported(f"tensor {name!r} is {what} ({'.'.join(function)})", call.offset)
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], PersistentId):
            raise self._corrupt(name, f"{len(arguments)} arguments, expected a storage and 5 or 6 more", call)
        storage, offset, shape, stride, _, hooks, *metadata = arguments
        if hooks not in ({}, None):
            raise self._corrupt(name, "it carries backward hooks", call)
        if metadata and any(metadata[0].values() if isinstance(metadata[0], dict) else [True]):
            raise self._unsupported(f"tensor {name!r} is a negated or conjugated view", call.offset)
        key, dtype, numel = self._storage(name, storage)
        tensor = StoredTensor(key, dtype, offset, shape, stride)
        self._check_geometry(name, tensor, numel, call)
        return tensor

    def _storage(self, name: str, reference: PersistentId) -> tuple[str, str, int]:
        """Return (key, dtype, elements) of a persistent id ``('storage', type, key, location, elements)``."""
        value = reference.value
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
            raise self._corrupt(name, "its storage is not described by 5 values", reference)
        _, kind, key, location, numel = value
        if not isinstance(key, str) or not _KEY.fullmatch(key) or not isinstance(location, str):
            raise self._corrupt(name, f"its storage has the key {key!r:.40}, expected digits", reference)
        if type(numel) is not int or numel < 0:
            raise self._corrupt(name, f"its storage has {numel!r:.40} elements", reference)
        if not isinstance(kind, Symbol) or not kind.name.endswith("Storage"):
            raise self._corrupt(name, "its storage has no type", reference)
        dtype = _STORAGE_DTYPES.get(kind.name)
        if dtype is None:
            raise self._unsupported(f"tensor {name!r} is stored as {kind}", reference.offset)
        if key not in self._sizes:
            raise self._corrupt(name, f"storage {key!r} is not in the archive", reference)
        if numel * STORAGE[dtype].itemsize != self._sizes[key]:
            raise self._corrupt(
                name, f"storage {key!r} has {self._sizes[key]} bytes, {numel} of {dtype} are declared", reference
            )
        if self._dtypes.setdefault(key, dtype) != dtype:
            raise self._corrupt(name, f"storage {key!r} is both {self._dtypes[key]} and {dtype}", reference)
        return key, dtype, numel

    def _check_geometry(self, name: str, tensor: StoredTensor, numel: int, call: Call) -> None:
        """Hold offset, shape and stride to the storage, in Python integers."""
        shape, stride = tensor.shape, tensor.stride
        if not _are_lengths(shape) or not _are_lengths(stride) or not _are_lengths((tensor.offset,)):
            raise self._corrupt(name, "its offset, size and stride are not non-negative integers", call)
        if len(shape) != len(stride) or len(shape) > _MAX_RANK or prod(shape) > _MAX_ELEMENTS:
            raise self._corrupt(name, f"its size {shape!r:.60} and stride {stride!r:.60} do not fit together", call)
        end = tensor.offset + (span(shape, stride) if prod(shape) else 0)
        if end > numel:
            raise self._corrupt(name, f"it reaches element {end} of a storage of {numel}", call)
        if not is_disjoint(shape, stride):
            raise self._unsupported(
                f"tensor {name!r} with size {shape} and stride {stride} repeats or interleaves its elements",
                call.offset,
            )


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, Call):
        return False
    function = (value.function.module, value.function.name)
    return function in _TENSORS or (
        function == _SUBCLASSED and bool(value.arguments) and _is_rebuild(value.arguments[0])
    )


def _is_rebuild(value: Any) -> bool:
    return isinstance(value, Symbol) and (value.module, value.name) in _TENSORS


def _has_tensors(values: Mapping[Any, Any]) -> bool:
    return any(_is_tensor(value) for value in values.values())


def _unwrap(call: Call) -> tuple[tuple[str, str], tuple[Any, ...]]:
    """Return the innermost rebuilding function and its arguments, below parameters and subclasses."""
    function, arguments = (call.function.module, call.function.name), call.arguments
    while True:
        if function in _PARAMETERS and arguments and isinstance(arguments[0], Call):
            inner = arguments[0]
            function, arguments = (inner.function.module, inner.function.name), inner.arguments
        elif function == _SUBCLASSED and len(arguments) == 4 and _is_rebuild(arguments[0]):
            function, arguments = (arguments[0].module, arguments[0].name), arguments[2]
            arguments = arguments if isinstance(arguments, tuple) else ()
        else:
            return function, arguments


def _are_lengths(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)

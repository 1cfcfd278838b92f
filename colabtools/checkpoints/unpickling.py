"""A reader of pickles that runs nothing: what they say is noted down, never called or imported.

Only operations that build plain values are known, and only names that weights need are admitted, as
labels. Each step is counted, so that no pickle takes long or much memory.

Source: Lib/pickletools.py of Python 3.13 for the operations; torch 2.13, `_weights_only_unpickler`
and torch/_utils.py for the names and for what is rebuilt from them.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from colabtools.checkpoints.headers import one_line
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["MAX_PICKLE_BYTES", "Machine", "Opaque", "Storage", "StoredTensor"]

# SDXL's has 0.5 MB and 90,000 steps; the state of an optimizer beside it makes that three times as
# much. Half a million steps are a quarter of a second and at most 100 MB.
MAX_PICKLE_BYTES = 16 * 1024**2
_MAX_STEPS = 500_000
# The fifth brings buffers from outside the pickle, which torch does not write.
_MAX_PROTOCOL = 4
_MAX_NAME_BYTES = 512
_MAX_RANK = 32
_MAX_SIZE = 2**63

_STORAGE_DTYPES: Mapping[str, str] = {
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ComplexFloatStorage": "C64",
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ShortStorage": "I16",
}
_STORAGES: Mapping[str, str] = {
    **{f"torch.{name}": dtype for name, dtype in _STORAGE_DTYPES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in _STORAGE_DTYPES.items()},
    "torch.storage.UntypedStorage": "U8",
}
_DTYPES: Mapping[str, str] = {
    "torch.bfloat16": "BF16",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.uint8": "U8",
}


class Opaque:
    """Something that a pickle holds and that is of no interest, such as a set or a device."""

    __slots__ = ()


@dataclass(frozen=True)
class _Label:
    """The name of a function or class, which stays a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors are views of: `count` values under a key of the archive."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it was pickled; offset and strides count values, not bytes."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Machine:
    """Reads the pickles of one file, one after another.

    Attributes:
        at: where the last one ends.
        storages: those that they speak of, by key.
    """

    def __init__(self, path: Path, data: bytes, *, cut: bool = False) -> None:
        """Note what to read.

        Args:
            path: the file, for messages.
            data: it begins with a pickle.
            cut: whether the file goes on after the data.
        """
        self.at = 0
        self.storages: dict[str, Storage] = {}
        self._path = path
        self._data = data
        self._cut = cut
        self._steps = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return what the next pickle holds; `at` is where it ends.

        Raises:
            CheckpointError: it names what weights have no need of, or it is damaged or too large.
        """
        self._stack, self._marks, self._memo = [], [], {}
        data, operations = self._data, _OPERATIONS
        try:
            while (code := data[self.at]) != _STOP:
                operation = operations.get(code)
                if operation is None:
                    self._refuse_operation(code)
                self.at += 1
                operation(self)
                self._steps += 1
                if self._steps > _MAX_STEPS:
                    raise self._damaged(f"its pickle takes more than {_MAX_STEPS} steps")
            value = self._stack.pop()
            self.at += 1
            return value
        except CheckpointError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
            if self.at >= len(data):
                fault = "has more than" if self._cut else "lacks its end, after"
                raise self._damaged(f"its pickle {fault} {len(data)} bytes") from error
            raise self._damaged(f"its pickle cannot be read at byte {self.at}") from error

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(
            f"{one_line(self._path)} cannot be used: {fault}; get the model as .safetensors"
        )

    def _refuse(self, name: str) -> NoReturn:
        raise CheckpointError(
            f"{one_line(self._path)} is refused: its pickle calls for {one_line(name)}, which "
            "weights have no need of and which can run code; get the model as .safetensors"
        )

    def _refuse_operation(self, code: int) -> NoReturn:
        names = {ord(operation.code): operation.name for operation in pickletools.opcodes}
        if code not in names:
            raise self._damaged(f"its pickle has the byte {code:#04x} for an operation")
        if names[code] == "INST":
            self.at += 1
            self._refuse(f"{self._line()}.{self._line()}")
        self._refuse(f"operation {names[code]}")

    def _take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if self.at > len(self._data):
            if not self._cut:
                raise self._damaged(f"its pickle lacks its end, in a value of {count} bytes")
            raise IndexError(self.at)
        return self._data[begin : self.at]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at, self.at + _MAX_NAME_BYTES)
        begin, self.at = self.at, end + 1
        return self._data[begin:end].decode("utf-8")

    def _items(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    # The operations, in the order of what they make.

    def _proto(self) -> None:
        if (protocol := self._number(1)) > _MAX_PROTOCOL:
            raise self._damaged(f"its pickle is of protocol {protocol}")

    def _frame(self) -> None:
        self._take(8)

    def _text(self, size: int) -> None:
        text = self._take(self._number(size))
        self._stack.append(text.decode("utf-8", "surrogatepass"))

    def _bytes(self, size: int) -> None:
        self._stack.append(self._take(self._number(size)))

    def _signed(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self) -> None:
        items = tuple(self._items())
        self._stack.append(items)

    def _short_tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise IndexError(count)
        self._stack[-count:] = [items]

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError(target)
        target.extend(items)

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise TypeError(target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Texts and small numbers are names of tensors. Others could be made to collide, and a
            # table of them would take hours.
            plain = type(key) is str or (type(key) is int and abs(key) < _MAX_SIZE)
            target[key if plain else Opaque()] = value

    def _put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def _global(self) -> None:
        self._admit(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError(name)
        self._admit(module, name)

    def _admit(self, module: str, name: str) -> None:
        # Python 2 had another name for it.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in _STORAGES and full not in _DTYPES and full not in _CALLS:
            self._refuse(full)
        self._stack.append(_Label(full))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _call(self, function: object, arguments: object) -> Any:
        if type(function) is not _Label or function.name not in _CALLS:
            self._refuse(f"a call of {getattr(function, 'name', 'what is no function')}")
        if type(arguments) is not tuple or len(arguments) > _MAX_RANK:
            raise TypeError(arguments)
        return _CALLS[function.name](self, arguments)

    def _build(self) -> None:
        # Attributes of a table, such as the versions of its modules, are of no interest.
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            self._refuse("operation BUILD")

    def _persistent(self) -> None:
        # Legacy files have a sixth item, for views as torch before 0.4 had them.
        found = self._stack.pop()
        if type(found) is not tuple or len(found) not in (5, 6):
            self._refuse("an object outside of it")
        kind, label, key, _, count, *view = found
        if kind != "storage" or type(label) is not _Label or label.name not in _STORAGES:
            self._refuse(f"the storage {getattr(label, 'name', kind)}")
        if type(key) is not str or not _is_size(count) or view not in ([], [None]):
            raise TypeError(key)
        storage = Storage(key, _STORAGES[label.name], count)
        if self.storages.setdefault(key, storage) != storage:
            raise self._damaged(f"its storage {one_line(key)} is described in two ways")
        self._stack.append(storage)

    # What the admitted names make of their arguments.

    def _table(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        table: dict[Any, Any] = {}
        for pairs in arguments:
            if type(pairs) not in (list, tuple):
                raise TypeError(pairs)
            self._steps += len(pairs)
            if self._steps > _MAX_STEPS:
                raise self._damaged(f"its pickle takes more than {_MAX_STEPS} steps")
            self._stack.append(table)
            for pair in pairs:
                self._set_items(list(pair) if len(pair) == 2 else [pair])
            self._stack.pop()
        return table

    def _rebuild(self, arguments: tuple[Any, ...]) -> StoredTensor:
        storage, offset, shape, strides = arguments[:4]
        whole = type(storage) is Storage and _is_size(offset)
        if not whole or not _are_sizes(shape) or not _are_sizes(strides):
            raise TypeError(arguments)
        if len(shape) != len(strides):
            raise ValueError(shape)
        return StoredTensor(storage, storage.dtype, offset, shape, strides)

    def _rebuild_typed(self, arguments: tuple[Any, ...]) -> StoredTensor:
        # Dtypes that have no storage of their own are said apart, over a storage of bytes.
        return replace(self._rebuild(arguments), dtype=_DTYPES[arguments[6].name])

    def _rebuild_parameter(self, arguments: tuple[Any, ...]) -> StoredTensor:
        tensor = arguments[0]
        if type(tensor) is not StoredTensor:
            raise TypeError(tensor)
        return tensor

    def _rebuild_subclass(self, arguments: tuple[Any, ...]) -> Any:
        function, _, inner, _ = arguments
        if type(function) is not _Label or not function.name.startswith("torch._utils."):
            self._refuse("a class of tensors that weights are not kept in")
        return self._call(function, inner)

    def _sizes(self, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        (sizes,) = arguments
        if not _are_sizes(sizes):
            raise TypeError(sizes)
        return sizes  # type: ignore[no-any-return]

    def _opaque(self, arguments: tuple[Any, ...]) -> Opaque:
        return Opaque()


def _is_size(found: object) -> bool:
    return type(found) is int and 0 <= found < _MAX_SIZE


def _are_sizes(found: object) -> bool:
    return type(found) is tuple and len(found) <= _MAX_RANK and all(map(_is_size, found))


_CALLS: Mapping[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "_codecs.encode": Machine._opaque,
    "builtins.bytearray": Machine._opaque,
    "builtins.complex": Machine._opaque,
    "builtins.set": Machine._opaque,
    "collections.Counter": Machine._opaque,
    "collections.OrderedDict": Machine._table,
    "torch.Size": Machine._sizes,
    "torch.Tensor": Machine._opaque,
    "torch._tensor._rebuild_from_type_v2": Machine._rebuild_subclass,
    "torch._utils._rebuild_parameter": Machine._rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": Machine._rebuild_parameter,
    "torch._utils._rebuild_tensor": Machine._rebuild,
    "torch._utils._rebuild_tensor_v2": Machine._rebuild,
    "torch._utils._rebuild_tensor_v3": Machine._rebuild_typed,
    "torch.device": Machine._opaque,
    "torch.nn.parameter.Parameter": Machine._rebuild_parameter,
}

_STOP = pickle.STOP[0]
_OPERATIONS: Mapping[int, Callable[[Machine], None]] = {
    code[0]: operation
    for code, operation in (
        (pickle.APPEND, Machine._append),
        (pickle.APPENDS, lambda m: m._extend(m._items())),
        (pickle.BINBYTES, lambda m: m._bytes(4)),
        (pickle.BINFLOAT, Machine._float),
        (pickle.BINGET, lambda m: m._get(m._number(1))),
        (pickle.BININT, Machine._signed),
        (pickle.BININT1, lambda m: m._stack.append(m._number(1))),
        (pickle.BININT2, lambda m: m._stack.append(m._number(2))),
        (pickle.BINPERSID, Machine._persistent),
        (pickle.BINPUT, lambda m: m._put(m._number(1))),
        (pickle.BINUNICODE, lambda m: m._text(4)),
        (pickle.BUILD, Machine._build),
        (pickle.EMPTY_DICT, lambda m: m._stack.append({})),
        (pickle.EMPTY_LIST, lambda m: m._stack.append([])),
        (pickle.EMPTY_SET, lambda m: m._stack.append(Opaque())),
        (pickle.EMPTY_TUPLE, lambda m: m._stack.append(())),
        (pickle.FRAME, Machine._frame),
        (pickle.GLOBAL, Machine._global),
        (pickle.LONG1, Machine._long),
        (pickle.LONG_BINGET, lambda m: m._get(m._number(4))),
        (pickle.LONG_BINPUT, lambda m: m._put(m._number(4))),
        (pickle.MARK, Machine._mark),
        (pickle.MEMOIZE, lambda m: m._put(len(m._memo))),
        (pickle.NEWFALSE, lambda m: m._stack.append(False)),
        (pickle.NEWOBJ, Machine._reduce),
        (pickle.NEWTRUE, lambda m: m._stack.append(True)),
        (pickle.NONE, lambda m: m._stack.append(None)),
        (pickle.PROTO, Machine._proto),
        (pickle.REDUCE, Machine._reduce),
        (pickle.SETITEM, Machine._set_item),
        (pickle.SETITEMS, lambda m: m._set_items(m._items())),
        (pickle.SHORT_BINBYTES, lambda m: m._bytes(1)),
        (
            pickle.SHORT_BINSTRING,
            lambda m: m._stack.append(m._take(m._number(1)).decode("latin-1")),
        ),
        (pickle.SHORT_BINUNICODE, lambda m: m._text(1)),
        (pickle.STACK_GLOBAL, Machine._stack_global),
        (pickle.TUPLE, Machine._tuple),
        (pickle.TUPLE1, lambda m: m._short_tuple(1)),
        (pickle.TUPLE2, lambda m: m._short_tuple(2)),
        (pickle.TUPLE3, lambda m: m._short_tuple(3)),
    )
}

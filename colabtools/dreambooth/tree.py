"""The state of a run, a tree of plain values and tensors, taken apart for files and put together.

Instead of a pickle, which can run code when it is loaded and which no other program can look into,
there are JSON for the structure and safetensors for the tensors. What comes back is what was
given: types, the order of keys, every bit of a float. Two things are not kept: tensors come back on
the CPU, and an OrderedDict as a dict.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["pack_tree", "unpack_tree"]


def pack_tree(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the structure, for JSON, and the tensors by the keys that it names.

    Args:
        tree: dict, list, tuple, str, int, float, bool, None, bytes, Tensor, NumPy array or scalar.

    Raises:
        CheckpointError: it holds something else; the message says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _pack(tree, "state", tensors), tensors


def unpack_tree(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree that `pack_tree` took apart.

    Raises:
        CheckpointError: the structure is not one of `pack_tree`, or a tensor is missing.
    """
    try:
        return _unpack(structure, tensors)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"a saved state has an unknown structure ({error!r}); update colabtools"
        ) from error


# JSON's own values stand for themselves: text, whole and finite numbers, true, false, null, list.
# Every other is an object of one entry, whose name says what it is.
def _pack(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    # Exact types: a subclass, such as an enum or a named tuple, would come back as its base.
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind in (list, tuple):
        items = [_pack(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        return _pack_dict(value, where, tensors)
    return {_store(value, where, tensors): str(len(tensors) - 1)}


def _pack_dict(value: Mapping[Any, Any], where: str, tensors: dict[str, torch.Tensor]) -> Any:
    items = [(key, _pack(item, f"{where}[{key!r}]", tensors)) for key, item in value.items()]
    if all(type(key) is str for key in value):
        return {"dict": dict(items)}
    return {"items": [[_pack(key, f"a key of {where}", tensors), item] for key, item in items]}


def _store(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> str:
    """Put a tensor aside, and return what it was."""
    key = str(len(tensors))
    if isinstance(value, torch.Tensor):
        tensors[key] = value.detach()
        return "tensor"
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            # A copy, because torch warns of arrays that cannot be written to.
            tensors[key] = torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where} is an array of {value.dtype}, not of numbers"
            ) from error
        return "array" if isinstance(value, np.ndarray) else "scalar"
    raise CheckpointError(
        f"{where} is a {type(value).__qualname__}, which cannot be saved; keep plain values, "
        "lists, tuples, dicts, arrays and tensors"
    )


def _unpack(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind in ("tensor", "array", "scalar"):
        tensor = tensors[value]
        return tensor if kind == "tensor" else tensor.numpy()[() if kind == "scalar" else ...]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if kind == "items":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value}
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in value)
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    raise ValueError(f"kind {kind!r}")

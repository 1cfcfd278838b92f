from __future__ import annotations

import enum
import json
import math
import random
import struct
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from colabtools.dreambooth.tree import pack_tree, unpack_tree
from colabtools.errors import CheckpointError

ODD_NAN = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]


def through_json(tree: Any) -> Any:
    structure, tensors = pack_tree(tree)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    return unpack_tree(json.loads(json.dumps(structure)), copies)


def fingerprint(tree: Any) -> Any:
    """Something that is equal only for trees that are the same to the bit and the type."""
    kind = type(tree).__name__
    if isinstance(tree, torch.Tensor):
        raw = tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return kind, str(tree.dtype), tuple(tree.shape), raw
    if isinstance(tree, (np.ndarray, np.generic)):
        return kind, str(tree.dtype), tree.shape, tree.tobytes()
    if isinstance(tree, dict):
        return kind, [(fingerprint(k), fingerprint(v)) for k, v in tree.items()]
    if isinstance(tree, (list, tuple)):
        return kind, [fingerprint(item) for item in tree]
    return kind, struct.pack(">d", tree) if isinstance(tree, float) else tree


@pytest.mark.parametrize(
    "tree",
    [
        None,
        True,
        0,
        -(2**200),
        0.1,
        -0.0,
        5e-324,
        1e16,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        ODD_NAN,
        "",
        'ü\0"\ud800',
        b"",
        bytes(range(256)),
        [],
        (),
        {},
        [1, (2.0, [3, ()]), {"a": (None,)}],
        {1: "int", "1": "text", (2, 3): "tuple", None: 0, 2.5: 1, False: 2, b"k": 3},
        {"dict": {"tuple": [1]}, "float": "not hex", "tensor": "0"},
        {"b": 1, "a": 2, 0: {"z": 1, "y": 2}},
        [torch.arange(6.0).reshape(2, 3), torch.tensor(1.5), torch.empty(0)],
        [torch.tensor([ODD_NAN, -0.0]).half(), torch.ones(2, dtype=torch.bfloat16)],
        [np.arange(3, dtype=np.uint32), np.array(2.5), np.float32(0.1), np.bool_(True)],
        np.arange(6, dtype=np.int16).reshape(2, 3).T,
    ],
)
def test_a_tree_comes_back_as_it_was(tree: Any) -> None:
    assert fingerprint(through_json(tree)) == fingerprint(tree)


def test_the_check_above_can_tell_trees_apart() -> None:
    trees = [1, 1.0, True, -0.0, 0.0, math.nan, ODD_NAN, [1], (1,), {"a": 1, "b": 2}]
    trees += [{"b": 2, "a": 1}, torch.ones(1), np.ones(1, np.float32), np.float32(1), "1", b"1"]
    prints = [fingerprint(tree) for tree in trees]
    assert [a for i, a in enumerate(prints) if a in prints[:i]] == []


def test_an_optimizer_goes_on_from_it_as_if_never_stopped() -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([w], lr=0.1, betas=(0.8, 0.9)) for w in weights]
    for step in range(6):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = weight.detach().sin() + step
            optimizer.step()
        if step == 2:
            optimizers[1] = torch.optim.AdamW([weights[1]], lr=0.5)
            optimizers[1].load_state_dict(through_json(optimizers[0].state_dict()))
    assert weights[0].equal(weights[1])


def test_generators_go_on_from_it_as_if_never_stopped() -> None:
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    expected = random.random(), np.random.rand(), torch.rand(1)
    python, numpy, pytorch = through_json(states)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(pytorch)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_a_read_only_array_is_taken() -> None:
    array = np.frombuffer(b"abcd", dtype=np.uint8)
    assert through_json(array).tobytes() == b"abcd"


def test_an_ordered_dict_comes_back_as_a_dict() -> None:
    assert type(through_json(OrderedDict(a=1))) is dict


class Colour(enum.IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1}, r"state\['x'\]\[1\] is a set"),
        (Colour.RED, r"is a Colour"),
        (Pair(1, 2), r"is a Pair"),
        (torch.float32, r"is a dtype"),
        (np.array(["text"]), r"is an array of <U4"),
        ({(1, frozenset()): 0}, r"a key of state.* is a frozenset"),
    ],
)
def test_what_would_come_back_changed_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pack_tree({"x": [0, value]})


@pytest.mark.parametrize("structure", [{"new": 1}, {"tensor": "7"}, {}, {"float": "zz"}])
def test_an_unknown_structure_is_an_error(structure: Any) -> None:
    with pytest.raises(CheckpointError, match="unknown structure"):
        unpack_tree(structure, {})

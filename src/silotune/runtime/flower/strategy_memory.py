"""What a Flower strategy remembers between rounds, as a value that a checkpoint can hold.

Its memory is every attribute that differs from a fresh object's: numbers, arrays, dicts and lists
of arrays, or an ArrayRecord. An attribute becomes a purpose of `ServerState.extra`,
`flower.<kind>.<attribute>`. Its tensors are named `<position>/<name>`, because strategies depend on
the order and a saved file does not keep it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from silotune.core.types import AdapterState

SIZE = "size"  # distinguishes an empty dict from an absent one
GONE = object()


def memory_of(strategy: object, fresh: object) -> dict[str, AdapterState]:
    """The attributes in which a strategy differs from a fresh one, as tensors.

    Raises:
        TypeError: One of them cannot be saved; the text names it and its type.
    """
    now, before = vars(strategy), vars(fresh)
    memory: dict[str, AdapterState] = {}
    for name in sorted(now.keys() | before.keys()):
        value = now.get(name, GONE)
        packed = _pack(value)
        if _same(value, before.get(name, GONE)):
            continue
        if packed is None:
            raise TypeError(f"'{name}' ({type(value).__name__})")
        memory[f"flower.{packed[0]}.{name}"] = packed[1]
    return memory


def restore(strategy: object, memory: Mapping[str, AdapterState]) -> None:
    """Set the attributes that `memory_of` took from an earlier object of the class."""
    for purpose, tensors in memory.items():
        _, kind, name = purpose.split(".", 2)
        setattr(strategy, name, _unpack(kind, tensors))


def _pack(value: Any) -> tuple[str, dict[str, Tensor]] | None:
    """Kind and tensors of a value; None if it cannot be saved."""
    from flwr.app import ArrayRecord

    match value:
        case None:
            kind, pairs = "none", []
        case bool() | int() | float() if not isinstance(value, np.generic):
            kind, pairs = "number", [("", np.array(value))]
        case np.generic():  # NumPy's float64 rounds differently from a Python float
            kind, pairs = "scalar", [("", np.array(value))]
        case np.ndarray():
            kind, pairs = "array", [("", value)]
        case list():
            kind, pairs = "list", [("", item) for item in value]
        case dict():
            kind, pairs = "dict", list(value.items())
        case ArrayRecord():
            kind, pairs = "record", [(key, array.numpy()) for key, array in value.items()]
        case _:
            return None
    if not all(isinstance(key, str) and isinstance(item, np.ndarray) for key, item in pairs):
        return None
    try:
        tensors = {
            f"{i:06d}/{key}": torch.from_numpy(np.array(item, order="C"))
            for i, (key, item) in enumerate(pairs)
        }
    except (TypeError, ValueError):  # texts, objects, integers beyond 64 bits
        return None
    return kind, {SIZE: torch.tensor(len(pairs)), **tensors}


def _unpack(kind: str, tensors: AdapterState) -> Any:
    from flwr.app import Array, ArrayRecord

    pairs = [
        (key.partition("/")[2], np.array(tensor.numpy()))
        for key, tensor in sorted(tensors.items())
        if key != SIZE
    ]
    match kind:
        case "none":
            return None
        case "number":
            return pairs[0][1].item()
        case "scalar":
            return pairs[0][1][()]
        case "array":
            return pairs[0][1]
        case "list":
            return [array for _, array in pairs]
        case "dict":
            return dict(pairs)
        case _:
            return ArrayRecord({key: Array(array) for key, array in pairs})


def _same(a: Any, b: Any) -> bool:
    """Whether an attribute still equals that of a fresh object."""
    if a is b or getattr(a, "__code__", a) is getattr(b, "__code__", b):  # functions, by their code
        return True
    one, other = _pack(a), _pack(b)
    if one is None or other is None:
        try:
            return type(a) is type(b) and bool(a == b)
        except ValueError:  # an array somewhere inside
            return False
    equal = one[0] == other[0] and one[1].keys() == other[1].keys()
    return equal and all(
        t.dtype == other[1][key].dtype and torch.equal(t, other[1][key])
        for key, t in one[1].items()
    )

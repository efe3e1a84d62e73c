"""Nested state as two files that hold data and no code: ``state.json``, and ``state.safetensors`` for its arrays.

A state is what ``state_dict`` methods give: dictionaries, lists and tuples of numbers, texts, booleans and None, with
NumPy arrays and tensors among them, and the dates, times, decimals and bytes that columns of prompts may have. It comes
back equal, with arrays as arrays and tensors (on the CPU) as tensors.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

STATE, ARRAYS = "state.json", "state.safetensors"
# Of each other type that a column may have: its mark, how it is written, and how it is read.
_WRITTEN: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime.datetime: ("datetime", lambda value: value.isoformat(), datetime.datetime.fromisoformat),
    datetime.date: ("date", lambda value: value.isoformat(), datetime.date.fromisoformat),
    datetime.time: ("time", lambda value: value.isoformat(), datetime.time.fromisoformat),
    datetime.timedelta: (
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    Decimal: ("decimal", str, Decimal),
    UUID: ("uuid", str, UUID),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode("ascii"), base64.b64decode),
}
_READ = {mark: read for mark, _, read in _WRITTEN.values()}


def write_state(folder: Path, state: Any) -> None:
    """Write a state into an existing folder.

    :param folder: where the two files go
    :param state: nested data
    :raises TypeError: if something in it is neither data nor an array; the message says where it stands
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, "", tensors, {})
    safetensors.torch.save_file(tensors, folder / ARRAYS)
    (folder / STATE).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def check_storable(value: Any) -> None:
    """:raises TypeError: if :func:`write_state` can't write it"""
    _plain(value, "", {}, {})


def read_state(folder: Path) -> Any:
    """Read what :func:`write_state` wrote."""
    tensors = safetensors.torch.load_file(folder / ARRAYS)
    return _restored(json.loads((folder / STATE).read_text(encoding="utf-8")), tensors)


def _plain(value: Any, path: str, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    """What JSON has of a value; arrays move to ``tensors``, each storage once."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach()
        # Tied weights are one tensor under two names.
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (path,)
        if same not in names:
            names[same] = path
            tensors[path] = tensor.cpu().contiguous().clone()
        return {"tensor" if isinstance(value, Tensor) else "array": names[same]}
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]", tensors, names) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, f"{path}({i})", tensors, names) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        _check_keys(value, path)
        # As pairs, because keys may be numbers, and so that no key is mistaken for one of the marks above.
        return {"dict": [[key, _plain(item, f"{path}/{key}", tensors, names)] for key, item in value.items()]}
    if type(value) in _WRITTEN:
        mark, write, _ = _WRITTEN[type(value)]
        return {mark: write(value)}
    raise TypeError(
        f"state{path} is a {type(value).__name__}, which a checkpoint can't hold: use numbers, texts, lists, "
        "dictionaries and arrays"
    )


def _check_keys(value: dict[Any, Any], path: str) -> None:
    for key in value:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise TypeError(f"state{path} has the key {key!r}; keys must be texts or whole numbers")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind in _READ:
        return _READ[kind](content)
    if kind == "tuple":
        return tuple(_restored(item, tensors) for item in content)
    return {key: _restored(item, tensors) for key, item in content}

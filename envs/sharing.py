"""Objects in the keyword arguments of an environment's specification, which its copies share."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode


class Shared:
    """Holds an object that copies of an ``EnvSpec`` must share: a model, a tokenizer, a reward, a data set.

    Gymnasium deep-copies the keyword arguments of a specification each time one is read from a wrapper; a model copied
    that way would double the memory and silently stop being the object its owner trains or watches.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __repr__(self) -> str:
        return f"Shared({self.value!r})"


def share(value: Any) -> Any:
    """Wrap everything that isn't plain data, such as JSON has, in :class:`Shared`."""
    if isinstance(value, AutoresetMode):
        return value.value  # JSON has no enumerations
    return value if isinstance(value, Shared) or _is_plain(value) else Shared(value)


def _is_plain(value: Any) -> bool:
    """Whether JSON has it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def unshare(value: Any) -> Any:
    """The object inside a :class:`Shared`, or the value itself."""
    return value.value if isinstance(value, Shared) else value

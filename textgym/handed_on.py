"""Constructor arguments that are handed on: stated once, where they are used, and listed by every signature.

What an argument means, and its default, stands at the class that uses it. Another one hands it on with
``**arguments: Unpack[...]`` of a ``TypedDict``, which says which arguments those are.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

from typing_extensions import get_type_hints

C = TypeVar("C")


def hands_on(receiver: type[Any] | None = None) -> Callable[[type[C]], type[C]]:
    """A decorator for classes whose constructors hand on what ``**arguments: Unpack[...]`` names.

    Then signatures list these arguments, with types and defaults of the class that takes them, and no others are
    accepted. ::

        >>> from typing_extensions import TypedDict, Unpack
        >>> class Shared(TypedDict, total=False):
        ...     retries: int
        >>> class Client:
        ...     def __init__(self, url: str, *, retries: int = 4) -> None: ...
        >>> @hands_on(Client)
        ... class Shop:
        ...     def __init__(self, url: str, **arguments: Unpack[Shared]) -> None:
        ...         self.client = Client(url, **arguments)
        >>> list(inspect.signature(Shop).parameters)
        ['url', 'retries']
        >>> Shop("http://a", retry=3)
        Traceback (most recent call last):
        TypeError: Shop got an unexpected keyword argument 'retry'; did you mean 'retries'? It takes url, retries

    :param receiver: the class that takes them; by default the base class
    """

    def decorated(cls: type[C]) -> type[C]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def checked(self: C, *args: Any, **arguments: Any) -> None:
            check_arguments(cls, arguments)
            init(self, *args, **arguments)

        constructor: Any = checked
        constructor.receiver = receiver
        cls.__init__ = constructor  # type: ignore[method-assign]
        itself = next(iter(inspect.signature(init).parameters.values()))
        constructor.__signature__ = inspect.Signature([itself, *constructor_parameters(cls).values()])
        return cls

    return decorated


def takers(cls: type[Any]) -> Iterator[type[Any]]:
    """The classes with a constructor that the arguments of a class may reach: itself, then base classes, or the class
    that :func:`hands_on` names and its base classes."""
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        yield base
        receiver = vars(init).get("receiver") if inspect.isfunction(init) else None
        if receiver is not None:
            yield from takers(receiver)
            return


def constructor_parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a constructor takes by name, those that it hands on as ``**arguments`` included.

    With ``**arguments: Unpack[...]`` these are the keys of a ``TypedDict``; without, all that the next class takes.
    """
    parameters: dict[str, inspect.Parameter] = {}
    handed_on: set[str] | None = None  # None for all
    for taker in takers(cls):
        init = inspect.unwrap(vars(taker)["__init__"])
        own = list(inspect.signature(init).parameters.values())[1:]  # without self
        rest, by_name_alone = None, bool(parameters)  # what is handed on is
        for parameter in own:
            if parameter.kind is parameter.VAR_KEYWORD:
                rest = parameter
            elif parameter.name not in parameters and (handed_on is None or parameter.name in handed_on):
                kind = parameter.KEYWORD_ONLY if by_name_alone else parameter.kind
                parameters[parameter.name] = parameter.replace(kind=kind)
        if rest is None:
            break
        keys = _keys(init, rest)
        if keys is not None:
            handed_on = keys if handed_on is None else handed_on & keys
    return parameters


def _keys(init: Any, rest: inspect.Parameter) -> set[str] | None:
    """The keys of the ``TypedDict`` that ``**rest`` is annotated with; None where it isn't."""
    if "Unpack" not in str(rest.annotation):
        return None
    hints = get_type_hints(SimpleNamespace(__annotations__={"rest": rest.annotation}), init.__globals__)
    return set(get_type_hints(get_args(hints["rest"])[0]))


def check_arguments(cls: type[Any], given: dict[str, Any]) -> None:
    """:raises TypeError: if a constructor is given by name what it doesn't take"""
    known = constructor_parameters(cls)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            public = [other for other in known if not other.startswith("_")]
            hint = f"did you mean {close[0]!r}? It" if close else "it"
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument {name!r}; {hint} takes {', '.join(public)}"
            )

"""Packages that only some users need: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import a module of a package that comes with an extra of textgym.

    :param module: what to import
    :param extra: the extra that has its package
    :param what: needs it, for the message
    :raises ModuleNotFoundError: if it is not installed, with the command that installs it
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs the package {error.name}: pip install "textgym[{extra}]"', name=error.name
        ) from error

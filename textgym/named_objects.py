"""Objects of a user's own code, by the names that options have for them: ``file.py:object`` and ``module:object``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def object_named(where: str, name: str, option: str) -> Any:
    """An object in a Python file or a module, which is run or imported for it.

    A file finds what lies beside it, and a module is also looked for in the current folder.

    :param where: the file, which ends in ``.py``, or the module
    :param name: of the object
    :param option: what errors call it, such as ``"reward='my_reward.py:score'"``
    :raises ValueError: if there is no such file, module or object, or its code fails while it is imported
    """
    module = _module_of_file(where, option) if where.endswith(".py") else _module_named(where, option)
    if not hasattr(module, name):
        raise ValueError(f"{option}: {where} has nothing named {name!r}")
    return getattr(module, name)


def _module_of_file(where: str, option: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {where}")
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    specification = importlib.util.spec_from_file_location(f"textgym_code_{path.stem}_{digest}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    _look_in(path.parent)  # stays there: functions may import when they are called
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[specification.name]
        raise _cannot_import(option, where, error) from error
    return module


def _module_named(where: str, option: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(where)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and where.startswith(error.name):
            raise ValueError(
                f"{option}: {error}, here or among what is installed; give file.py:function or module:object"
            ) from error
        raise _cannot_import(option, where, error) from error


def _look_in(folder: Path) -> None:
    """Let Python find modules in a folder, as it does in that of a script it runs."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def _cannot_import(option: str, where: str, error: Exception) -> ValueError:
    """Says which line failed: the innermost one outside of Python's own import machinery."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    lines = [frame for frame in lines if Path(frame.filename) != Path(__file__)]
    place = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}: "
        problem = error.msg
    else:
        problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ValueError(f"{option}: {where} can't be imported; {place}{problem}")

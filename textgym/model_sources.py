"""Where language models come from: names, directories, hub ids, adapters and tokenizers, and errors that say so."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from textgym.engine.exactness import first_line
from textgym.engine.merging import adapter_base, adapter_base_on_hub, hub_file, without_adapter
from textgym.vocabulary import is_encoder_decoder

if TYPE_CHECKING:
    from peft import PeftModel

_OWN_CODE = (
    "comes with Python code of its own, which is run only where trust_remote_code=True says so (--trust-remote-code, "
    "of generate and evaluate --trust-code). Read it first: it can do whatever you can"
)


def locate(spec: str | Path) -> str:
    """The directory or hub id behind a model's name."""
    if spec == "embedded":
        from textgym.embedded import LANGUAGE_MODEL

        return str(LANGUAGE_MODEL)
    if spec == "smollm2":
        from textgym.packaged.smollm2 import smollm2_directory

        return str(smollm2_directory())
    if spec == "gemma3":
        from textgym.packaged.gemma3 import gemma3_directory

        return str(gemma3_directory())
    path = Path(spec).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ValueError(f"language_model={str(spec)!r} is a file; give the directory that save_pretrained wrote")
    if _looks_like_path(spec):
        raise FileNotFoundError(f"language_model={str(spec)!r}: there is no such directory")
    return str(spec)


def _looks_like_path(spec: str | Path) -> bool:
    """Whether it can't be the id of a model on the hub."""
    return isinstance(spec, Path) or spec.startswith((".", "/", "~")) or spec.count("/") > 1


def base_below(spec: str | Path, location: str) -> str | None:
    """What an adapter was trained on; None of a model.

    :param location: a directory, or a hub id
    """
    if Path(location).is_dir():
        return adapter_base(location)
    try:
        return None if hub_file(location, "config.json") else adapter_base_on_hub(location)
    except OSError as e:
        raise cannot_open(spec, e) from e


def has_tokenizer(location: str) -> bool:
    """Whether an adapter comes with a tokenizer of its own."""
    file = "tokenizer_config.json"
    return Path(location, file).is_file() if Path(location).is_dir() else hub_file(location, file) is not None


def open_tokenizer(
    spec: str | Path | PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    if isinstance(spec, PreTrainedTokenizerBase):
        return spec
    if not isinstance(spec, str | Path):
        raise TypeError(
            f"tokenizer={spec!r} is a {type(spec).__name__}; give a directory, a hub id or a tokenizer object"
        )
    path = Path(spec).expanduser()
    if _looks_like_path(spec) and not path.exists():
        raise FileNotFoundError(f"tokenizer={str(spec)!r}: there is no such directory")
    try:
        return AutoTokenizer.from_pretrained(
            str(path) if path.exists() else str(spec), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as e:
        if _has_own_code(e):
            raise ValueError(f"tokenizer={str(spec)!r} {_OWN_CODE}") from e
        raise ValueError(
            f"tokenizer={str(spec)!r} can't be opened: {first_line(e)}. Give a directory with the tokenizer's files, "
            "a hub id or a tokenizer object"
        ) from e


def generation_config(location: str) -> GenerationConfig | None:
    """The generation configuration that a checkpoint has, if it has one."""
    try:
        return GenerationConfig.from_pretrained(location)
    except (OSError, ValueError):
        return None  # as where the model itself is opened


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """What opens or builds a language model with that configuration."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def with_adapter_merged(model: PreTrainedModel | PeftModel, name: str) -> PreTrainedModel:
    """A plain model with the adapters that a model carries in its weights; a warning says so."""
    plain = without_adapter(model, f"language_model={name}")
    warnings.warn(
        f"language_model={name}: what peft added is now part of the weights, in the policy and in the reference, and "
        "all weights are trained and saved; give lora=True as well to train an adapter on top",
        UserWarning,
        stacklevel=3,
    )
    return plain


@contextlib.contextmanager
def opening_the_base(spec: str | Path, base: str) -> Iterator[None]:
    """Errors say that it is the model that an adapter belongs to."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise ValueError(
            f"language_model={str(spec)!r} is an adapter on {base!r}, which its adapter_config.json names: {e}"
        ) from e


def cannot_open(spec: str | Path, error: Exception) -> ValueError:
    if _has_own_code(error):
        return ValueError(f"language_model={str(spec)!r} {_OWN_CODE}")
    return ValueError(
        f"language_model={str(spec)!r} can't be opened as a language model: {first_line(error)}. "
        "Give 'embedded', 'smollm2', 'gemma3', a directory written by save_pretrained, or the id of a model on the hub"
    )


def _has_own_code(error: Exception) -> bool:
    """Whether transformers refused to run code of a checkpoint."""
    return "trust_remote_code" in str(error)


@contextlib.contextmanager
def refusing_own_code(what: str) -> Iterator[None]:
    """Say in textgym's words that code of a checkpoint, which nobody allowed, is not run.

    :param what: the argument and its value
    """
    try:
        yield
    except (OSError, ValueError) as e:
        if _has_own_code(e):
            raise ValueError(f"{what} {_OWN_CODE}") from e
        raise


def resolve_device(device: str | torch.device) -> torch.device:
    """:param device: a torch device or its name; ``"auto"`` is CUDA where available, else the CPU."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"device={device!r} is not a device; give 'auto', 'cpu', 'cuda' or 'cuda:N'") from e
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices; give 'cpu'")
    return resolved


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """:param dtype: a floating-point torch dtype or its name, such as ``"bfloat16"``."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point type; give 'float32', 'bfloat16' or 'float16'")
    return resolved


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Without transformers' progress bars: making an environment or saving a model should print nothing."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' report on a head that a checkpoint lacks: for whoever checks what is missing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)

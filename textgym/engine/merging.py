"""Adapters that ``peft`` put on a model, merged into its weights: a plain model that computes the same.

A policy trains, shares and saves weights as they stand in a plain model. What is trained in a model that carries an
adapter would be lost when it is saved, because ``transformers`` then writes the adapter alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from textgym.engine.encoder_decoder import model_inputs
from textgym.engine.shared_weights import copy_sharing_weights

if TYPE_CHECKING:
    from peft import PeftModel

TOKENS = 8  # that are tried
CONFIG = "adapter_config.json"
ADVICE = "merge it yourself (model.merge_and_unload() of a peft.PeftModel) and give the merged model"


def is_peft_model(model: object) -> bool:
    """Whether it is a ``peft.PeftModel``, which wraps a model of ``transformers``."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def carries_adapter(model: nn.Module) -> bool:
    """Whether there are layers of ``peft`` in a model."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def without_adapter(model: PreTrainedModel | PeftModel, name: str) -> PreTrainedModel:
    """A plain model with the adapters of another in its weights. What no adapter is on shares its memory.

    :param model: a model with layers of ``peft``, which stays as it is
    :param name: what messages call it
    :raises ValueError: if they can't be merged, or the merged model computes something else
    """
    inner: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(f"{name} carries a prompt adapter of peft, which can't become part of its weights")
    plain = copy_sharing_weights(inner.eval())
    try:
        merge_layers(plain)
    except (ValueError, AttributeError, NotImplementedError) as e:
        raise ValueError(
            f"{name} carries an adapter that can't be merged into its weights: {e}. Try to {ADVICE}"
        ) from e
    if "_hf_peft_config_loaded" in vars(plain):
        # load_adapter() leaves in the model how it renamed the adapter's weights, and saving would rename all others;
        # delete_adapter() doesn't undo it.
        plain._hf_peft_config_loaded, plain._weight_conversions = False, None
    trained = {id(p) for p in inner.parameters() if p.requires_grad}
    plain.requires_grad_(bool(trained))
    difference, scale = _difference(inner, plain)
    if not difference <= (3e-4 if plain.dtype == torch.float32 else 5e-2) * scale:
        raise ValueError(
            f"{name} carries an adapter, and with the adapter merged into its weights its logits differ by "
            f"{difference:.2g}: it is switched off, or on several layers that share one matrix; {ADVICE}"
        )
    return plain


def merge_layers(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Put every layer that an adapter is on in its adapter's place, with the adapter in its weights.

    Layers that share a matrix share an adapter, too (:func:`textgym.lora.add_lora`), which is added to it once.

    :param model: changed in place; its weights are replaced and never written to
    :param adapter_names: which adapters; None for the active ones
    :raises ValueError: if layers share a matrix and have adapters of their own
    """
    from peft.tuners.lora import LoraLayer

    merged: dict[int, tuple[int, ...]] = {}  # weights, and the factors that have been added to each
    for name, layer in list(_outermost(model)):
        if isinstance(layer, LoraLayer):
            plain: Any = layer
            while isinstance(plain, LoraLayer):  # around fused experts there are several, one for each parameter
                weight = adapted_weight(plain)
                factors = tuple(id(factor) for factor in (*plain.lora_A.values(), *plain.lora_embedding_A.values()))
                if id(weight) not in merged:
                    plain.merge(safe_merge=True, adapter_names=adapter_names)
                elif merged[id(weight)] != factors:
                    raise ValueError(f"{name} shares its weights with another layer, and each has its own adapter")
                merged[id(weight)] = factors
                plain = plain.base_layer
        else:
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=adapter_names)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config


def adapted_weight(layer: Any) -> nn.Parameter:
    """The weight that a layer of LoRA adds to."""
    name = getattr(layer, "parameter_name", None)
    return layer.get_base_layer().weight if name is None else layer.get_param()


def adapter_base(directory: str | Path) -> str | None:
    """The model that an adapter in a directory was trained on, as its configuration names it; None if there is none.

    :raises ValueError: if there is an adapter whose configuration doesn't say
    """
    file = Path(directory, CONFIG)
    return _named_base(file, directory) if file.is_file() else None


def adapter_base_on_hub(name: str) -> str | None:
    """The same of an adapter on the hub, or in the cache of what was there; None if there is none.

    :param name: an id such as ``organisation/adapter``
    :raises OSError: as :func:`hub_file`
    :raises ValueError: if there is an adapter whose configuration doesn't say
    """
    file = hub_file(name, CONFIG)
    return None if file is None else _named_base(Path(file), name)


def hub_file(name: str, file: str) -> str | None:
    """Where a file of a hub id is on this machine; None if the id has no such file.

    :raises OSError: if there is no such id, or the hub can't be reached and its cache doesn't have the id
    """
    path: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return path


def _named_base(file: Path, directory: str | Path) -> str:
    """What an adapter's configuration says that it was trained on.

    :raises ValueError: if it doesn't say, or names the adapter itself
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{file} can't be read: {e}") from e
    if not isinstance(base, str) or not base or Path(base).expanduser().resolve() == Path(directory).resolve():
        raise ValueError(
            f"{file} does not say what the adapter was trained on (base_model_name_or_path={base!r}): open that model, "
            "put the adapter on it with peft.PeftModel.from_pretrained, and give what merge_and_unload() makes of them"
        )
    return base


def merged_from(directory: str | Path, base: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model with an adapter from a directory or the hub in its weights.

    :param base: what the adapter was trained on; stays as it is
    :param name: what messages call it
    :raises ModuleNotFoundError: without ``peft``
    :raises ValueError: if the adapter does not fit
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(f'{name} is an adapter, which needs the package peft: pip install "textgym[lora]"')
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # asked for by peft
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(copy_sharing_weights(base), str(directory))
    except (ValueError, RuntimeError, OSError, TypeError, UserWarning) as e:
        raise ValueError(f"{name} is an adapter that does not fit its base model {type(base).__name__}: {e}") from e
    return without_adapter(adapted, name)


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers of ``peft`` that are not part of another."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(inside or "\0"):
            inside += (f"{name}.",)
            yield name, module


@torch.no_grad()
def _difference(model: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """The largest difference between the logits of two models, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (1, TOKENS), generator=generator).to(model.device)
    inputs = model_inputs(model, ids, TOKENS // 2)
    one, two = (m(**inputs, use_cache=False).logits.float() for m in (model, other))
    return float((one - two).abs().max()), float(one.abs().max())

"""What a checkpoint keeps of a model of which a part is frozen: the weights that learn.

A frozen backbone is where the model was opened from. It is many times the size of its head or its adapters, so of it a
checkpoint holds a digest alone, which says whether it still is what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from textgym.checkpoint_folders import CheckpointError

WEIGHTS_FILE = "trained.safetensors"
_DIGEST = "frozen"


def save_trained(model: PreTrainedModel, path: Path) -> None:
    """Write the weights that learn, and what else of a model may change."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _changing(model)}
    save_file(tensors, path, {_DIGEST: _digest(model)})


def load_trained(model: PreTrainedModel, path: Path) -> None:
    """Put what :func:`save_trained` wrote into a model that was opened as that one was.

    :raises CheckpointError: if the frozen weights aren't those beside which the others learned, or others are frozen
    """
    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get(_DIGEST)
        names = set(file.keys())
    if names != {name for name, _ in _changing(model)} or digest != _digest(model):
        raise CheckpointError(
            f"the checkpoint {path.parent} is of another model: its frozen weights are not those that training began "
            "with. Give the model that it began with"
        )
    model.load_state_dict(load_file(path), strict=False)


def _changing(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, however many modules share it."""
    kept = model.state_dict().keys()  # without the buffers that are made anew with a model
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def _digest(model: PreTrainedModel) -> str:
    """Of the frozen weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

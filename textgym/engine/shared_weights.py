"""Copies of a model with modules of their own and the weights of the original: the weights are in memory once."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copy_sharing_weights(module: Module) -> Module:
    """A copy whose parameters and buffers read and write the original's memory, and are frozen.

    Modules can be added, replaced or unfrozen in the copy without the original's noticing. A weight that is trained in
    place would change in both; one that is moved to another device or loaded by assignment no longer is the same.
    """
    return copy.deepcopy(module, sharing_memo(module))


def sharing_memo(module: nn.Module) -> dict[int, Any]:
    """For ``copy.deepcopy``: what makes copies of a module share its weights."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = frozen_view(parameter)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    return memo


def frozen_view(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of its own over the same memory. ``detach`` keeps counting in-place changes for both."""
    if type(parameter) is not nn.Parameter:  # quantised weights carry more than a tensor
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def storage(tensor: Tensor) -> int:
    """Address of a tensor's memory, to tell whether two share it."""
    return tensor.untyped_storage().data_ptr()

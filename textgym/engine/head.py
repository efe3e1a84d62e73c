"""From last hidden states to logits, by the model's own code.

Most models multiply their last hidden states with one matrix, and some scale or cap what comes of it under names that
textgym knows. Others do more: a layer before the matrix (BERT), a multiplier or a cap under a name of their own, a bias
kept elsewhere. For these the model's ``forward`` runs with a stand-in for all that comes before the last hidden states.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from textgym.engine.trunk import trunk_of
from textgym.vocabulary import is_encoder_decoder

LARGE = 1000.0  # logits at which a cap shows that weights have not grown into yet


class _States:
    """What a trunk hands out, of which only the last hidden states are there."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, which: Any) -> Any:
        return (self.last_hidden_state,)[which]


class _EncoderStates(BaseModelOutput):
    """The same of an encoder; decoders ask whether it is one of transformers' outputs."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _stand_in(trunk: nn.Module, states: Tensor) -> nn.Module:
    """A module that looks like a trunk, and whose last hidden states are given."""
    twin = copy.copy(trunk)  # some heads look up numbers or layers there
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    vars(twin).update({name: OrderedDict() for name in hooks}, forward=lambda *_, **__: _States(states))
    return twin


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits as the model's own ``forward`` makes them of its last hidden states; gradients flow where enabled.

    :param hidden: ``(..., H)``
    :return: ``(..., V)``
    """
    states = hidden.reshape(1, -1, hidden.shape[-1])  # (1, N, H)
    trunk = trunk_of(model)
    if trunk is model:  # T5's language model has its encoder and decoder itself
        trunk = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is trunk)
    standing_in = _with_part(model, name.split("."), _stand_in(trunk, states))
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if is_encoder_decoder(model.config):
        inputs = {"encoder_outputs": _EncoderStates(last_hidden_state=states[:, :1]), "decoder_input_ids": ids}
    # Not called as a module: what a library hooked to the whole model has nothing to do with a part of it.
    logits: Tensor = type(model).forward(standing_in, **inputs, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


def _with_part(module: Any, path: list[str], part: nn.Module) -> Any:
    """A module that shares everything with another but the part at a path; neither is changed by the other's use."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = dict(module._modules)
    inner = part if len(path) == 1 else _with_part(module._modules[path[0]], path[1:], part)
    twin._modules[path[0]] = inner
    return twin


@torch.no_grad()
def is_right(
    head: Callable[[Tensor], Tensor], model: PreTrainedModel, inputs: dict[str, Tensor], last: Tensor, tolerance: float
) -> bool:
    """Whether a head gives the model's own logits, and would with weights that have grown.

    :param head: makes logits of hidden states
    :param inputs: of the model's own forward over one row
    :param last: ``(H,)`` the last hidden state of that row
    :param tolerance: largest difference, relative to the largest logit
    """
    factor, called = 1.0, False

    def scale(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal called
        called = True
        return (arguments[0] * factor, *arguments[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(scale)
    try:
        expected = model(**inputs, use_cache=False).logits[0, -1].float()
        right = close(head(last).float(), expected, tolerance)
        if right and called:  # the hook scales what goes into the output layer here and there
            factor = LARGE / max(1e-6, float(expected.abs().max()))
            grown = model(**inputs, use_cache=False).logits[0, -1].float()
            right = close(head(last).float(), grown, tolerance)
    finally:
        hook.remove()
    return right


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits are the same but for rounding, relative to the largest."""
    return got.shape == expected.shape and bool((got - expected).abs().max() <= tolerance * expected.abs().max())

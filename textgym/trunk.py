"""What of a language model makes its last hidden states."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from textgym.vocabulary import is_encoder_decoder


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """All of a model but its head; of an encoder-decoder, with both its parts."""
    base: nn.Module = model.base_model
    if base is not model or is_encoder_decoder(model.config):
        return base
    # Llama 4 doesn't say under which name it has its trunk, and is its own base model.
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), base)

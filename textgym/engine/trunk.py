"""What of a language model makes its last hidden states."""

from __future__ import annotations

from transformers import PreTrainedModel

from textgym.vocabulary import is_encoder_decoder


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """All of a model but its head; of an encoder-decoder, with both its parts. A model without a head is its own."""
    base: PreTrainedModel = model.base_model
    if base is not model or is_encoder_decoder(model.config):
        return base
    # Llama 4 doesn't say under which name it has its trunk, and is its own base model. With an encoder of pictures, it
    # has a whole language model, which reads the text, as a part.
    reader = model.get_decoder()
    if reader is not model:
        return trunk_of(reader)
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), base)

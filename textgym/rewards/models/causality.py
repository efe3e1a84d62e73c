"""Whether a transformer reads from left to right, found out by trying: an architecture's name does not tell."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def is_causal(trunk: PreTrainedModel) -> bool:
    """Whether no token sees those after it.

    :param trunk: a transformer without head, what :func:`~textgym.engine.trunk.trunk_of` finds
    """
    if getattr(trunk.config, "is_encoder_decoder", False):
        return False
    training = trunk.training
    trunk.eval()
    vocabulary = int(trunk.config.get_text_config().vocab_size)
    ids = torch.arange(1, 7, device=trunk.device).remainder(vocabulary)[None]  # (1, 6)
    other = ids.clone()
    other[0, -1] = (int(ids[0, -1]) + vocabulary // 2) % vocabulary
    # With a mask: some models guess one from their padding token otherwise.
    mask = torch.ones_like(ids)
    first, second = (trunk(input_ids=x, attention_mask=mask).last_hidden_state[0, 0] for x in (ids, other))
    trunk.train(training)
    return bool(torch.equal(first, second)) or bool(torch.allclose(first, second, atol=1e-5))

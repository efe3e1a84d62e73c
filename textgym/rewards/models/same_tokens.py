"""Whether token ids of one tokenizer mean the same to a model with another."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from textgym.rewards.prefixes import PrefixBatch


class SameTokens:
    """Compares tokenizers with a model's own.

    :param own: the model's tokenizer
    :param vocab_size: ids that the model has
    :param encoder_decoder: whether the model reads prompts with an encoder, and so as whole texts
    """

    def __init__(self, own: PreTrainedTokenizerBase, vocab_size: int, encoder_decoder: bool = False) -> None:
        self.own = own
        self.vocab_size = vocab_size
        # T5's tokenizer ends a whole text with EOS. Prompts that are to be continued don't end so.
        self._texts_end = own("a")["input_ids"][-1:] == [own.eos_token_id]
        self._prompts_end = encoder_decoder and self._texts_end
        # The tokenizer is kept with the verdict: the id of one that is gone may come to stand for another.
        self._known: dict[int, tuple[PreTrainedTokenizerBase, bool]] = {}

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether that tokenizer's ids mean the same to the model."""
        known = self._known.get(id(tokenizer))
        if known is None:
            own = self.own
            same = tokenizer is own or (
                tokenizer.bos_token_id == own.bos_token_id
                and tokenizer.eos_token_id == own.eos_token_id
                and tokenizer("a")["input_ids"] == own("a")["input_ids"]  # e.g. both begin with BOS
                and tokenizer.get_vocab() == own.get_vocab()
            )
            known = self._known[id(tokenizer)] = (tokenizer, bool(same))
        return known[1]

    def of(self, batch: PrefixBatch) -> bool:
        """Whether the model can read a batch's token ids; a policy may have ids that its tokenizer lacks."""
        if batch.input_ids.max(initial=0) >= self.vocab_size or not self(batch.tokenizer):
            return False
        if not self._texts_end:
            return True
        # A policy of the other kind has prompts that end in another way. EOS alone is a prompt of either.
        rows = np.flatnonzero(batch.prompt_lengths > 1)
        ends = batch.input_ids[rows, batch.prompt_lengths[rows] - 1] == self.own.eos_token_id
        return bool((ends == self._prompts_end).all())

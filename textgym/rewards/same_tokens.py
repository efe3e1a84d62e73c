"""Whether token ids of one tokenizer mean the same to a model with another."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class SameTokens:
    """Compares tokenizers with a model's own.

    :param own: the model's tokenizer
    """

    def __init__(self, own: PreTrainedTokenizerBase) -> None:
        self.own = own
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

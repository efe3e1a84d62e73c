"""Whether token ids of one tokenizer mean the same to a model with another."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from textgym.rewards.prefixes import PrefixBatch


class SameTokens:
    """Compares tokenizers with a model's own.

    :param own: the model's tokenizer
    :param vocab_size: ids that the model has
    """

    def __init__(self, own: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.own = own
        self.vocab_size = vocab_size
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
        return bool(batch.input_ids.max(initial=0) < self.vocab_size) and self(batch.tokenizer)

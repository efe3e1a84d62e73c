"""What an environment must know of a language model that it doesn't run: its tokens and how long a row may be."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class Vocabulary:
    """A tokenizer and the sizes of the model it belongs to.

    :param tokenizer: the tokenizer
    :param config: configuration of the model
    :param name: what messages call the model
    :raises ValueError: if the tokenizer has tokens the model lacks, or no end-of-sequence token
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
        self.tokenizer = tokenizer
        self.size = int(config.get_text_config().vocab_size)
        self.context_limit = position_limit(config)
        self._prompts_end = is_encoder_decoder(config)  # an encoder reads a prompt as a whole text
        self._known = set(tokenizer.get_vocab().values())
        tokens = max(len(self._known), max(self._known, default=-1) + 1)
        if tokens > self.size:
            raise ValueError(
                f"the tokenizer has {tokens} tokens and the model {name} only {self.size}: "
                "they don't belong together; pass the tokenizer the model was trained with"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name} has no end-of-sequence token; set tokenizer.eos_token")

    @property
    def eos_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        """What padding is written with; masks decide what is padding, so sharing an id with EOS does no harm."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else int(pad)

    @property
    def special_token_ids(self) -> list[int]:
        """Special tokens other than end-of-sequence, and ids the tokenizer has no token for."""
        special = {i for i in self.tokenizer.all_special_ids if i != self.eos_token_id}
        return sorted(special | (set(range(self.size)) - self._known))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts before a text (BOS) and nothing after it.

        What an encoder reads keeps what comes after a text, too: the EOS of T5.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        if len(ids) > 1 and ids[-1] == self.eos_token_id and not self._prompts_end:
            ids = ids[:-1]  # a prompt is to be continued
        return ids

    def cut_left(self, ids: list[int], limit: int) -> list[int]:
        """The last ``limit`` token ids of a prompt; a BOS at its start, which models trained with one expect, stays.

        So does what an encoder's prompts end in, as that is among the last.

        :param ids: of the prompt
        :param limit: most tokens to keep, at least 1
        """
        if len(ids) <= limit:
            return ids
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[0] == bos and limit > 1:
            return [bos, *ids[-(limit - 1) :]]
        return ids[-limit:]


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether the model reads a prompt with an encoder and writes the completion with a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def position_limit(config: PreTrainedConfig) -> int | None:
    """Most tokens of a row that the model was built for.

    :return: the limit in tokens, None when the configuration names none
    """
    text: Any = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    rope: Any = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        # Where the longest row of a batch passes that length, LongRoPE turns the keys of all rows by other angles.
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    return _smallest(limits)


def context_limit(config: PreTrainedConfig) -> int | None:
    """Most tokens the slot cache serves exactly: the model's positions, or its attention window if that is smaller.

    :return: the limit in tokens, None when the configuration names none
    """
    text: Any = config.get_text_config()
    limits = [position_limit(config)]
    layer_types = getattr(text, "layer_types", None)
    if (layer_types is None or "sliding_attention" in layer_types) and getattr(text, "use_sliding_window", True):
        limits.append(getattr(text, "sliding_window", None))
    if layer_types is None or "chunked_attention" in layer_types:
        limits.append(getattr(text, "attention_chunk_size", None))
    return _smallest(limits)


def _smallest(limits: list[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)

"""What an environment must know of a language model that it doesn't run: its tokens and how long a row may be."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from textgym.chat.turns import TurnTokens


class Vocabulary:
    """A tokenizer and the sizes of the model it belongs to.

    ``turns`` knows which tokens open and end a turn (:class:`~textgym.chat.turns.TurnTokens`).

    :param tokenizer: the tokenizer
    :param config: configuration of the model
    :param name: what messages call the model
    :param generation: the model's generation configuration, whose ends of a text come before those of ``config``
    :raises ValueError: if the tokenizer has tokens the model lacks, or no end-of-sequence token
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        name: str,
        generation: GenerationConfig | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.size = int(config.get_text_config().vocab_size)
        self.context_limit = position_limit(config)
        self._prompts_end = is_encoder_decoder(config)  # an encoder reads a prompt as a whole text
        # LED's encoder and decoder have limits of their own; a completion begins after a start token.
        positions = getattr(config, "max_decoder_position_embeddings", None) if self._prompts_end else None
        self.completion_limit: int | None = None if positions is None else int(positions) - 1
        self._known = set(tokenizer.get_vocab().values())
        tokens = max(len(self._known), max(self._known, default=-1) + 1)
        if tokens > self.size:
            raise ValueError(
                f"the tokenizer has {tokens} tokens and the model {name} only {self.size}: "
                "they don't belong together; pass the tokenizer the model was trained with"
            )
        listed = [i for i in _ends(tokenizer, config, generation) if 0 <= i < self.size]
        if tokenizer.eos_token_id is None:
            _set_eos_token(tokenizer, name)
        self.turns = TurnTokens(tokenizer, listed)
        self._check_that_it_writes(name)

    def _check_that_it_writes(self, name: str) -> None:
        """:raises ValueError: if the tokenizer makes no token of a text that is made of its own"""
        ordinary = [i for i in itertools.islice(self._known, 64) if i not in self.turns.special_ids]
        text = str(self.tokenizer.decode(ordinary)).strip()
        if text and not self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            kind = type(self.tokenizer).__name__
            raise ValueError(
                f"the tokenizer of {name}, a {kind}, makes no token of {text[:40]!r}, which is a text of its own "
                "tokens: its files belong to another class than transformers opens them with for this model; pass a "
                "tokenizer object (tokenizer=...)"
            )

    @property
    def eos_token_id(self) -> int:
        """What ends a text that nothing else is known of."""
        return int(self.tokenizer.eos_token_id)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion, :attr:`eos_token_id` and the chat template's end of turn included."""
        return self.turns.end_ids

    @property
    def pad_token_id(self) -> int:
        """What padding is written with; masks decide what is padding, so sharing an id with EOS does no harm."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else int(pad)

    @property
    def special_token_ids(self) -> list[int]:
        """Special tokens other than ends and tags such as ``<think>``, and ids the tokenizer has no token for."""
        special = self.turns.special_ids - self.turns.tag_ids
        return sorted((special | (set(range(self.size)) - self._known)).difference(self.end_ids))

    def end_after(self, prompt: Sequence[int]) -> int:
        """What an answer to a prompt of these ids is to end with; see :meth:`TurnTokens.end_after`."""
        end = self.turns.end_after(prompt)
        return self.eos_token_id if end is None else end

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts before a text (BOS), once, and nothing after it.

        What an encoder reads keeps what comes after a text, too: the EOS of T5.
        """
        return self.turns.encode(text, whole=self._prompts_end)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts."""
        return self.turns.encode_all(texts, whole=self._prompts_end)

    def written(self, ids: Sequence[int]) -> str:
        """The text that gives the token ids of a prompt; see :meth:`TurnTokens.written`."""
        closing = self.turns.closing_ids if self._prompts_end else []
        return self.turns.written(
            ids[: len(ids) - len(closing)] if closing and list(ids[-len(closing) :]) == closing else ids
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, as rewards see it; see :meth:`TurnTokens.decode`."""
        return self.turns.decode(ids)

    def cut_left(self, ids: list[int], limit: int) -> list[int]:
        """The last ``limit`` token ids of a prompt; a BOS at its start, which models trained with one expect, stays.

        So does what an encoder's prompts end in, as that is among the last.

        :param ids: of the prompt
        :param limit: most tokens to keep, at least 1
        """
        if len(ids) <= limit:
            return ids
        bos, opening = self.tokenizer.bos_token_id, self.turns.opening_ids
        kept = opening if opening and ids[: len(opening)] == opening else [bos] if ids[0] == bos else []
        return [*kept, *ids[len(kept) - limit :]] if len(kept) < limit else ids[-limit:]


def _ends(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation: GenerationConfig | None
) -> list[int]:
    """The ends of a text that a model's configuration lists.

    Those of a generation configuration are meant. A model configuration has one even where nobody chose it, Llama's is
    2, whatever the tokenizer has there: it counts only where it is a special token without another role.
    """
    if listed := listed_ends(generation):
        return listed
    others = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id)
    special = TurnTokens(tokenizer).special_ids.difference(others)
    return [i for i in _as_ids(getattr(config.get_text_config(), "eos_token_id", None)) if i in special]


def listed_ends(generation: GenerationConfig | None) -> list[int]:
    """The ends of a text that somebody wrote into a generation configuration."""
    # transformers makes one out of the model's configuration where a checkpoint has none.
    if generation is None or getattr(generation, "_from_model_config", False):
        return []
    return _as_ids(generation.eos_token_id)


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [int(i) for i in values if isinstance(i, int) and not isinstance(i, bool)]


def _set_eos_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Let the separator of a tokenizer without an end-of-sequence token, BERT's ``[SEP]``, be that.

    :raises ValueError: if it has none either
    """
    token = tokenizer.sep_token
    if token is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token; set tokenizer.eos_token")
    tokenizer.eos_token = token
    warnings.warn(
        f"the tokenizer of {name} has no end-of-sequence token: {token!r} is taken for it. Set tokenizer.eos_token to "
        "have another",
        UserWarning,
        stacklevel=4,
    )


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether the model reads a prompt with an encoder and writes the completion with a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


# What configurations call the number of positions; the first that one has is it.
POSITIONS = ("max_position_embeddings", "max_target_positions", "max_encoder_position_embeddings", "max_seq_len")


def position_limit(config: PreTrainedConfig) -> int | None:
    """Most tokens of a row that the model was built for.

    :return: the limit in tokens, None when the configuration names none
    """
    text: Any = config.get_text_config()
    limits = [next((limit for name in POSITIONS if (limit := getattr(text, name, None)) is not None), None)]
    rope: Any = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        # Where the longest row of a batch passes that length, LongRoPE turns the keys of all rows by other angles.
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    return _smallest(limits)


def context_limit(config: PreTrainedConfig) -> int | None:
    """Most tokens that all see each other: the model's positions, or its attention window if that is smaller.

    :return: the limit in tokens, None when the configuration names none
    """
    text: Any = config.get_text_config()
    limits = [position_limit(config)]
    layer_types = getattr(text, "layer_types", None)
    if (layer_types is None or "sliding_attention" in layer_types) and getattr(text, "use_sliding_window", True):
        limits.append(getattr(text, "sliding_window", None))
    if layer_types is None or "chunked_attention" in layer_types:
        limits.append(getattr(text, "attention_chunk_size", None))
    if "indexed_attention" in (layer_types or ()):
        limits.append(getattr(text, "index_topk", None))
    return _smallest(limits)


def _smallest(limits: list[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)

"""Texts and their prefixes as tokens.

A causal model reads a complete text with an end-of-sequence token after it, as
:class:`~textgym.rewards.CausalRewardModel` does; an unfinished one stands without. An encoder reads each with the
special tokens that its tokenizer puts around a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from textgym.chat.turns import TurnTokens


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text: ``head`` + ``completion`` + ``tail``.

    :param head: tokens of the prompt, with the special tokens before it
    :param completion: tokens of the completion
    :param tail: special tokens after a complete text
    :param prefix_tail: special tokens after a text that goes on
    :param opening: how many special tokens ``head`` begins with, which stay where a text is cut
    """

    head: list[int]
    completion: list[int]
    tail: list[int]
    prefix_tail: list[int]
    opening: int = 0

    def cut_left(self, limit: int) -> EncodedText:
        """The text with its last tokens, at most ``limit`` with those around it."""
        ids, begin = self.head + self.completion, self.opening
        first = max(begin, len(ids) - (limit - begin - len(self.tail)))
        start = max(first, len(self.head))
        return replace(self, head=ids[:begin] + ids[first:start], completion=ids[start:])

    def cut_to(self, head: int, limit: int) -> EncodedText:
        """The text with the last tokens of its prompt, at most ``head``, and then the first of its completion.

        :param limit: most tokens in all
        """
        kept = self.head
        if len(kept) > head:
            kept = kept[: self.opening] + kept[len(kept) - max(0, head - self.opening) :]
        if len(kept) + len(self.completion) + len(self.tail) <= limit:
            return replace(self, head=kept)
        completion = self.completion[: max(0, limit - len(kept) - len(self.prefix_tail))]
        return replace(self, head=kept, completion=completion, tail=self.prefix_tail)

    @property
    def ids(self) -> list[int]:
        return self.head + self.completion + self.tail

    def prefix(self, length: int) -> list[int]:
        """The tokens of the text that ends, for now, after ``length`` tokens of the completion."""
        return self.head + self.completion[:length] + self.prefix_tail

    @property
    def shortest(self) -> int:
        """Fewest tokens of the completion that leave anything to read."""
        return 0 if self.head else min(1, len(self.completion))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_length: int,
    ends_in_eos: bool,
) -> tuple[list[EncodedText], int]:
    """Tokens of texts; prompt and completion are tokenized as one text, as rewards do.

    :param max_length: most tokens of a text; longer ones lose tokens at their beginning
    :param ends_in_eos: whether a complete text is followed by an end-of-sequence token and an unfinished one by
        nothing; otherwise both are followed by what the tokenizer puts there
    :return: the tokens, and how many texts were longer than ``max_length`` and lost their beginning
    """
    texts = _whole(tokenizer, prompts, completions, ends_in_eos)
    return [text.cut_left(max_length) for text in texts], sum(len(text.ids) > max_length for text in texts)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    max_length: int,
    ends_in_eos: bool,
) -> tuple[list[tuple[EncodedText, EncodedText]], int]:
    """Tokens of pairs. Both sides of a pair that is too long are cut alike, so that what differs can be compared.

    They keep the same end of the prompt: all of it, or what its completions leave of ``max_length``, at least half.
    Completions that are longer than the rest lose their end, and are unfinished texts then.

    :return: the tokens of both sides, and how many pairs were cut; see :func:`encode`
    """
    better = _whole(tokenizer, prompts, chosen, ends_in_eos)
    worse = _whole(tokenizer, prompts, rejected, ends_in_eos)
    pairs, cut = [], 0
    for pair in zip(better, worse, strict=True):
        if max(len(text.ids) for text in pair) <= max_length:
            pairs.append(pair)
            continue
        cut += 1
        longest = max(len(text.completion) + len(text.tail) for text in pair)
        head = max(max_length - longest, max_length // 2)
        one, other = (text.cut_to(head, max_length) for text in pair)
        pairs.append((one, other))
    return pairs, cut


def _whole(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str], ends_in_eos: bool
) -> list[EncodedText]:
    """Tokens of texts of any length."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    turns = TurnTokens(tokenizer)
    whole, alone = turns.encode_all(texts, whole=True), turns.encode_all(prompts, whole=True)
    special, eos = set(tokenizer.all_special_ids), tokenizer.eos_token_id
    encoded = []
    for ids, prompt_ids, prompt in zip(whole, alone, prompts, strict=True):
        stop = len(ids)
        if ends_in_eos:
            while stop and ids[stop - 1] == eos:  # some tokenizers add one to everything
                stop -= 1
        else:
            while stop and ids[stop - 1] in special:
                stop -= 1
        tail = ([] if eos is None else [eos]) if ends_in_eos else ids[stop:]
        start = 0
        while start < min(stop, len(prompt_ids)) and ids[start] == prompt_ids[start]:
            start += 1
        begin = 0  # special tokens at the beginning, which stay where a text is cut
        while begin < start and ids[begin] in special:
            begin += 1
        if not prompt:
            start = begin
        encoded.append(EncodedText(ids[:start], ids[start:stop], tail, [] if ends_in_eos else tail, begin))
    return encoded


def token_positions(text: EncodedText, lengths: Iterable[int]) -> list[int]:
    """Positions of the last tokens of prefixes with so many tokens of the completion."""
    return [len(text.head) + length - 1 for length in lengths]


def end_positions(text: EncodedText) -> list[int]:
    """Positions at which the text is complete: its last token, and the special tokens after it."""
    last = len(text.ids) - 1
    content = len(text.head) + len(text.completion) - 1
    return [last] if content in (-1, last) else [content, last]

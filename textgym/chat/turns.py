"""What opens and ends a turn, for one tokenizer: the one place that knows.

Chat models end a turn with another token than a text, tokenizers put tokens around a text of their own accord, and chat
templates write headers around turns. :class:`TurnTokens` says which tokens these are, encodes texts so that each stands
there once, and decodes what rewards, logs and pictures show.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from textgym.chat.templated_texts import TemplatedTexts
from textgym.decoding import PrefixDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contents that stand in no template by chance.
_USER, _ASSISTANT = "Qzu", "Qza"
# What is written without spaces between words: Han, its punctuation and full-width forms.
_HAN = "\u2e80-\u2fdf\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_SPACES_AT_HAN = re.compile(f"(?<=[{_HAN}]) +| +(?=[{_HAN}])")
# The forms in which a tag is opened and closed.
_TAGS = (("<{}>", "</{}>"), ("[{}]", "[/{}]"), ("<|{}|>", "<|/{}|>"))


class TurnTokens:
    """The tokens around turns.

    :param tokenizer: a tokenizer
    :param listed: ends that the model's configuration lists, besides the tokenizer's end-of-sequence token
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, listed: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._listed = frozenset(int(i) for i in listed)
        self.eos_token_id = None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """All special tokens, those without a role included."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added if token.special}

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """What the chat template writes after an answer; the end-of-sequence token where it writes nothing."""
        answered = self._rendered("user", "assistant")
        found = None if answered is None else self._first_special(answered.rpartition(_ASSISTANT)[2])
        if found is None:
            # Some templates leave an answer open; the model then ends it with what opens the next turn.
            going_on = self._rendered("user", "assistant", "user")
            found = None if going_on is None else self._first_special(going_on.rpartition(_ASSISTANT)[2])
            found = found if found in self._listed else None
        return self.eos_token_id if found is None else found

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a turn: those listed, end-of-sequence, and the chat template's end of turn."""
        ends = {*self._listed, self.eos_token_id, self.end_of_turn_id}
        return tuple(sorted(i for i in ends if i is not None))

    @cached_property
    def tag_ids(self) -> frozenset[int]:
        """Special tokens that open or close a tag, such as ``<think>`` and ``</think>``: content, not structure."""
        tokens = {token: i for i, token in self._special_tokens().items() if i not in self._roles}
        tags = set()
        for opening, closing in _TAGS:
            begin, end = opening.split("{}")
            for token in tokens:
                name = token[len(begin) : len(token) - len(end)]
                if token == opening.format(name) and closing.format(name) in tokens:
                    tags |= {tokens[token], tokens[closing.format(name)]}
        return frozenset(tags - self._around_users)

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Special tokens that no text shows: ends, padding and the like, and the chat template's headers.

        Other special tokens are content, such as ``<think>`` or the marks of a tool call.
        """
        ends = self.special_ids.intersection(self.end_ids)
        return frozenset(self._roles | ends | self._headers)

    def end_after(self, prompt: Sequence[int]) -> int | None:
        """What an answer is to end with: end of turn after a prompt from the chat template, else end of sequence.

        :param prompt: token ids
        :return: None where the tokenizer has no end
        """
        marks = (self._headers - self._roles) | {self.end_of_turn_id}
        return self.eos_token_id if marks.isdisjoint(prompt) else self.end_of_turn_id

    @cached_property
    def answer_opening(self) -> str:
        """What the chat template writes between what a user says and the answer; empty without a template."""
        rendered = self._rendered("user", add_generation_prompt=True)
        return "" if rendered is None else rendered.rpartition(_USER)[2]

    @cached_property
    def opening_ids(self) -> list[int]:
        """What the tokenizer puts before a text of its own accord: often a beginning-of-sequence token."""
        return self._around[0]

    @cached_property
    def closing_ids(self) -> list[int]:
        """What the tokenizer puts after a text of its own accord: T5's end-of-sequence token."""
        return self._around[1]

    def encode(self, text: str, *, whole: bool = False) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it, once.

        What is in the chat template gets what the template puts there, and no more: transformers' own
        ``apply_chat_template`` puts no beginning-of-sequence token before one that writes none. What the text itself
        says stays, an end-of-sequence token at its end included.

        :param whole: also with what the tokenizer puts after it; without, the text is to be continued
        """
        return self.encode_all([text], whole=whole)[0]

    def encode_all(self, texts: Sequence[str], *, whole: bool = False) -> list[list[int]]:
        """:meth:`encode` of many texts."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        before, behind = self.opening_ids, self.closing_ids if whole else []
        encoded = []
        for text, ids in zip(texts, rows, strict=True):
            opened = ids[: len(before)] == before or bool(before and self.templated.are_opened(text))
            closed = bool(behind) and ids[-len(behind) :] == behind
            encoded.append([*([] if opened else before), *ids, *([] if closed else behind)])
        return encoded

    def pieces(self, text: str) -> list[str]:
        """A text, taken apart where its tokens end; together the pieces are the text."""
        if not self.tokenizer.is_fast:
            ids = self._bare(text)
            ends = [len(part) for part in self.decode_all([ids[:n] for n in range(1, len(ids))])] + [len(text)]
        else:
            spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            ends = [*(end for _, end in spans[:-1]), len(text)] if spans else []
        return [text[start:end] for start, end in itertools.pairwise([0, *ends])]

    def written(self, ids: Sequence[int]) -> str:
        """The text that gives these token ids: :meth:`encode` backwards, with all special tokens of its own."""
        before = self.opening_ids
        kept = list(ids[len(before) :] if before and list(ids[: len(before)]) == before else ids)
        return self._clean(self._prefixes.texts([kept])[0])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, as rewards see it: without :attr:`hidden_ids`.

        A character whose bytes are not all there at the end is left out (:class:`~textgym.decoding.PrefixDecoder`), so
        that the texts of a row's prefixes are prefixes of its text.
        """
        return self.decode_all([ids])[0]

    def decode_all(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """:meth:`decode` of many rows."""
        texts = self._prefixes.texts([[i for i in row if i not in self.hidden_ids] for row in rows])
        return [self._clean(text) for text in texts]

    @cached_property
    def templated(self) -> TemplatedTexts:
        """What texts in the chat template look like."""
        return TemplatedTexts(self)

    def rendered(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> str | None:
        """Messages through the chat template; None where there is none or it refuses them.

        :param options: further ones of ``apply_chat_template``
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except (TemplateError, ValueError, TypeError):
            return None
        return text if isinstance(text, str) else None

    def showing(self, texts: Sequence[str]) -> TurnTokens:
        """The same, but that decoded texts also show the special tokens whose names stand in some texts.

        :param texts: such as stop strings
        """
        names = self._special_tokens()
        shown = {i for i in self.hidden_ids if any(names[i] in text for text in texts)}
        if not shown:
            return self
        other = TurnTokens(self.tokenizer, self._listed)
        other.hidden_ids = self.hidden_ids - shown
        return other

    # ------------------------------------------------------------------ what the tokenizer says

    @cached_property
    def _roles(self) -> frozenset[int]:
        """Special tokens with a role: beginning, end, padding, unknown, and those of encoders."""
        names = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
        ids = (getattr(self.tokenizer, f"{name}_token_id", None) for name in names)
        return frozenset(int(i) for i in ids if i is not None)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        bare, whole = self._bare("a"), list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    @cached_property
    def _prefixes(self) -> PrefixDecoder:
        return PrefixDecoder(self.tokenizer)

    @cached_property
    def _spaces_at_han(self) -> bool:
        """Whether decoding puts spaces between Chinese characters, as BERT's tokenizers do."""
        ids = self._bare("天气")
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return " " in str(text).strip() and len(ids) == 2

    def _clean(self, text: str) -> str:
        """A decoded text without spaces that only the tokenizer put there."""
        return _SPACES_AT_HAN.sub("", text) if self._spaces_at_han else text

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _around_users(self) -> set[int]:
        """Special tokens that the chat template writes where nobody but a user has spoken: ``[INST]`` is not a tag."""
        return self._special_in("user")

    @cached_property
    def _headers(self) -> set[int]:
        """Special tokens that the chat template writes around contents; tags aren't, such as an empty ``<think>``."""
        written = self._special_in("system", "user", "assistant", "user") | self._special_in(
            "user", "assistant", "user"
        )
        return self._around_users | (written - self.tag_ids)

    def _special_in(self, *roles: str) -> set[int]:
        """Special tokens that the chat template writes in a conversation."""
        rendered = self._rendered(*roles)
        return set() if rendered is None else set(self._bare(rendered)) & self.special_ids

    def _special_tokens(self) -> dict[int, str]:
        ids = sorted(self.special_ids)
        return dict(zip(ids, map(str, self.tokenizer.convert_ids_to_tokens(ids)), strict=True))

    def _first_special(self, text: str) -> int | None:
        """The special token that a text begins with, white space aside."""
        for i in self._bare(text):
            if i in self.special_ids:
                return i
            if str(self.tokenizer.decode([i])).strip():
                return None
        return None

    def _rendered(self, *roles: str, add_generation_prompt: bool = False) -> str | None:
        """A conversation of these roles through the chat template; None where it takes no such one."""
        text = self.rendered(
            [{"role": role, "content": _ASSISTANT if role == "assistant" else _USER} for role in roles],
            add_generation_prompt,
        )
        return text if text is not None and text.count(_ASSISTANT) == roles.count("assistant") else None

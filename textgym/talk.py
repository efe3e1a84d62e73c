"""A person and a model talk, a turn each: what ``textgym chat`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from textgym.action_masks import ActionMasks
from textgym.episode_rules import EpisodeRules
from textgym.generation import append_tokens
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import as_chat, fit_prompt
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply, Transcript
from textgym.rewards import Reward
from textgym.rewards.base import prefix_potentials_of
from textgym.rewards.scores import payable
from textgym.sampling import SamplingSettings, TurnLimits
from textgym.texts import Texts, token_texts

MOST_TOKENS = 4096  # of a conversation, with a model that takes more


@dataclass(frozen=True)
class Answer:
    """A turn of the model.

    :param tokens: S of them as text; ``"".join(tokens)`` is the answer
    :param rewards: ``(S,)`` what they earned: differences of Φ; None without a reward
    :param score: Φ of the conversation by now; None without a reward
    :param begins: whether the conversation began anew with it, because there was no room for more
    """

    tokens: list[str]
    rewards: np.ndarray | None
    score: float | None
    begins: bool


class Talk:
    """A conversation with a model. What was written stays as it is, token by token.

    In a chat template what the person says is the user's message. Elsewhere the model goes on with the text: what is
    said first is the prompt, and what is said later is appended.

    :param model: writes the answers
    :param sampling: how; its limits of turns don't count: the conversation goes on while the model has room
    :param reward: Φ, for the rewards of tokens
    :param columns: that the reward reads
    :param masks: tokens that may be chosen; None for all
    :param seed: of the sampling
    :param system: what the system says before, in a chat template
    :param separator: between what was written and what is said to it, in plain texts
    :param deterministic: whether to take the most likely tokens
    """

    def __init__(
        self,
        model: LanguageModel,
        sampling: SamplingSettings,
        reward: Reward | None = None,
        columns: Mapping[str, Any] | None = None,
        masks: ActionMasks | None = None,
        seed: int = 0,
        system: str | None = None,
        separator: str = " ",
        deterministic: bool = False,
    ) -> None:
        if system is not None and not sampling.chat:
            raise ValueError(f"system={system!r} is said in the chat template, and the model writes plain texts here")
        self.model, self.sampling, self.reward = model, sampling.one_turn(), reward
        self.columns, self.masks = dict(columns or {}), masks
        self.system, self.separator, self.deterministic = system, separator, deterministic
        self._generator = torch.Generator(device=model.device).manual_seed(seed)
        self._person = _Person()
        self._texts: Texts | None = None

    @property
    def transcript(self) -> Transcript:
        """The messages after the first one; the model's are the assistant's."""
        return [] if self._texts is None else self._texts.batch(_ROW).transcripts[0]

    def say(self, text: str) -> Answer:
        """Say something, and let the model answer.

        :raises ValueError: if there is no room for it, or the text has no tokens
        """
        begins = self._texts is not None and not self._go_on(text)
        if self._texts is None or begins:
            self._begin(text)
        return self._answer(begins)

    def _go_on(self, text: str) -> bool:
        """Put what is said after what was said; whether there was room."""
        assert self._texts is not None
        self._person.said = text if self.sampling.chat else self.separator + text
        self._texts.answer(_ROW)
        self._texts.keep()
        return not self._texts.done[0] and not self._texts.cut[0]

    def _begin(self, text: str) -> None:
        vocabulary = self.model.vocabulary
        row = PromptRow(text, self.columns)
        row, ids = fit_prompt(as_chat(row, vocabulary, self.system) if self.sampling.chat else row, vocabulary)
        room = min(vocabulary.context_limit or MOST_TOKENS, MOST_TOKENS) - len(ids)
        if room < 1:
            raise ValueError(f"{len(ids)} tokens leave no room for an answer in the {room + len(ids)} of the model")
        limits = TurnLimits(room, room, room)  # more turns than tokens there can't be
        rules = EpisodeRules(vocabulary, self.sampling, limits)
        self._texts = Texts(1, len(ids) + room, rules, self._person)
        self._texts.begin(0, row, ids)
        self.model.cached(self._texts.context).forget(_ROW)
        if self.masks is not None:
            self.masks.forget(_ROW, self._texts.context)

    @torch.no_grad()
    def _answer(self, begins: bool) -> Answer:
        texts = self._texts
        assert texts is not None
        cached = self.model.cached(texts.context)
        ended = False
        while not ended:
            logits = self.model.head(cached.last_hidden(texts.ids, texts.lengths, _ROW, texts.prompt_lengths))
            append_tokens(texts, _ROW, logits, _ROW, self.masks, self._generator, self.deterministic)
            ended = texts.turn_reasons[0] is not None
        batch, written = texts.batch(_ROW), int(texts.turn_tokens[0])
        tokens = token_texts(batch, 0)[-written:]
        if self.reward is None:
            return Answer(tokens, None, None, begins)
        self.reward.forget(_ROW)
        end = int(batch.completion_lengths[0])
        [values] = prefix_potentials_of(self.reward, batch, [np.arange(end - written, end + 1)])
        potentials = np.nan_to_num(payable(self.reward, values, batch, 0))
        return Answer(tokens, np.diff(potentials), float(potentials[-1]), begins)


_ROW = np.zeros(1, dtype=np.int64)


class _Person(Reply):
    """Says what was typed."""

    said = ""

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> Sequence[str]:
        return [self.said]

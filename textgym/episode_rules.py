"""The rules of an episode: how long its prompt and its completion may be, and at which token it ends, and why.

There is one object for whatever writes texts: the environment, ``generate`` and ``evaluate`` ask it, and so a text ends
at the same token in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from textgym.prompts.fitting import FittedPrompt, fit_prompt, judge_lengths
from textgym.prompts.rows import PromptRow
from textgym.rewards import PrefixBatch
from textgym.sampling import SamplingSettings, TurnLimits
from textgym.vocabulary import Vocabulary

DEFAULT_MAX_PROMPT_TOKENS = 64


class EpisodeRules:
    """What texts of one model are, under some settings.

    A turn ends with ``"eos"`` at a token that ends a turn, with ``"stop"`` at the token that completes a stop
    string, and with ``"length"`` when its budget is used up; the first two not before ``min_new_tokens``. Where nobody
    replies the completion is one turn, and ends with it.

    :param vocabulary: of the language model
    :param sampling: limits and stop strings
    :param turns: limits of episodes of several turns; None for one turn
    :param max_actions: most tokens that the policy writes in an episode, where that is less than what all this allows
    :raises ValueError: if the settings have limits of turns, and ``turns`` is None
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sampling: SamplingSettings,
        turns: TurnLimits | None = None,
        max_actions: int | None = None,
    ) -> None:
        if turns is None and sampling.in_turns:
            raise ValueError(
                f"max_turns={sampling.max_turns}, max_reply_tokens={sampling.max_reply_tokens}, "
                f"max_total_tokens={sampling.max_total_tokens} are of texts in which somebody replies: give a reply, "
                "too"
            )
        self.vocabulary = vocabulary
        self.sampling = sampling
        self.turns = turns
        most = sampling.max_new_tokens
        if turns is not None:
            most = min(turns.max_turns * most, turns.max_total_tokens)
        self.max_actions = most if max_actions is None else min(most, max_actions)
        self._ends = np.array(vocabulary.end_ids)
        self._stop_turns = vocabulary.turns.showing(sampling.stop)  # a stop string may be a special token

    @property
    def max_total_tokens(self) -> int:
        """Most tokens after a prompt."""
        return self.sampling.max_new_tokens if self.turns is None else self.turns.max_total_tokens

    def fit(self, row: PromptRow) -> FittedPrompt:
        """A prompt as the model sees it, with its ids, cut where they are more than ``max_prompt_tokens``."""
        return fit_prompt(row, self.vocabulary, self.sampling.max_prompt_tokens)

    def judge(self, rows: Iterable[PromptRow], overflow: str) -> bool:
        """Say before anything is computed which prompts are too long; see
        :func:`~textgym.prompts.fitting.judge_lengths`."""
        assert self.sampling.max_prompt_tokens is not None
        return judge_lengths(rows, self.vocabulary, self.sampling.max_prompt_tokens, overflow)

    def finish_reasons(
        self, tokens: np.ndarray, counts: np.ndarray, stopped: np.ndarray | None = None
    ) -> list[str | None]:
        """Why each of B turns ends with its newest token, or None where it goes on.

        :param tokens: ``(B,)`` the newest tokens
        :param counts: ``(B,)`` how many tokens the turns have with these
        :param stopped: ``(B,)`` bool, whether the token completed a stop string
        """
        reasons = np.full(len(tokens), None, dtype=object)
        reasons[counts >= self.sampling.max_new_tokens] = "length"
        if stopped is not None:
            reasons[stopped & (counts >= self.sampling.min_new_tokens)] = "stop"
        # min_new_tokens come before an end, which is not one of them.
        reasons[np.isin(tokens, self._ends) & (counts > self.sampling.min_new_tokens)] = "eos"
        found: list[str | None] = reasons.tolist()
        return found

    def stop_strings(self, batch: PrefixBatch, searched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a stop string was completed in what is new of B turns.

        :param batch: the turns; what was written before counts as the prompt
        :param searched: ``(B,)`` how many of their characters were known before
        :return: ``(B,)`` bool, and ``(B,)`` how many characters are known now
        """
        texts = dataclasses.replace(batch, turns=self._stop_turns).completions
        stopped = [
            any(stop in text[max(0, start - len(stop) + 1) :] for stop in self.sampling.stop)
            for text, start in zip(texts, searched.tolist(), strict=True)
        ]
        return np.array(stopped, dtype=bool), np.array([len(text) for text in texts], dtype=np.int64)


def prompt_room(
    max_prompt_tokens: int | None, budget: int, context_limit: int | None, name: str = "max_new_tokens"
) -> int:
    """Most tokens of a prompt: as asked, or 64, or what the model's context leaves.

    :param max_prompt_tokens: the option, None where it isn't given
    :param budget: most tokens after a prompt
    :param context_limit: most tokens that the model takes, None for any number
    :param name: what errors call the budget
    :raises ValueError: if the two options are together more than that
    """
    room = None if context_limit is None else context_limit - budget
    if room is not None and room < 1:
        raise ValueError(f"{name}={budget} leaves no room for a prompt: the model's context is {context_limit}")
    if max_prompt_tokens is None:
        return DEFAULT_MAX_PROMPT_TOKENS if room is None else min(DEFAULT_MAX_PROMPT_TOKENS, room)
    if room is not None and max_prompt_tokens > room:
        raise ValueError(
            f"max_prompt_tokens={max_prompt_tokens} and {name}={budget} are together more than the "
            f"model's context of {context_limit} tokens"
        )
    return max_prompt_tokens

"""Which prompt a row gets next: one that was asked for, the next of a round, or one drawn with the row's own seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.utils import seeding

from textgym.chat.messages import is_one_conversation
from textgym.checks import shown
from textgym.envs.arguments import check_start
from textgym.envs.rounds import EpisodeRound
from textgym.episode_rules import EpisodeRules
from textgym.prompts.fitting import FittedPrompt
from textgym.prompts.reading import read_prompt
from textgym.prompts.rows import PromptRow, PromptSource


class PromptStream:
    """The prompts of N rows.

    ``rngs`` draws each row's prompts and ``seeds`` is what they were seeded with; ``round`` is the round of episodes
    that prompts are taken from, if any.

    :param source: what prompts are drawn from
    :param rules: how long a prompt may be
    :param overflow: ``prompt_overflow``: what is done with longer ones
    :param told_long: whether the user knows already that some are cut
    :param num_rows: N
    """

    def __init__(
        self, source: PromptSource, rules: EpisodeRules, overflow: str, told_long: bool, num_rows: int
    ) -> None:
        self.source = source
        self.rules = rules
        self.overflow = overflow
        self.num_rows = num_rows
        self.rngs: list[np.random.Generator] = [np.random.default_rng() for _ in range(num_rows)]
        self.seeds: tuple[int | None, ...] | None = None
        self.round: EpisodeRound | None = None
        self._told_long = told_long

    def seed(self, seeds: list[int | None] | None, rows: np.ndarray, first: list[int | None] | None) -> None:
        """Seed the random numbers of some rows.

        :param seeds: N seeds; a row without one goes on as it is
        :param rows: ``(B,)``
        :param first: what stands for ``seeds`` the first time, if there are none
        """
        if seeds is None and self.seeds is None:
            seeds = first or [None] * self.num_rows
        if seeds is None:
            return
        kept = list(self.seeds or [None] * self.num_rows)
        for row in rows.tolist():
            if seeds[row] is not None or kept[row] is None:
                self.rngs[row], kept[row] = seeding.np_random(seeds[row])
        self.seeds = tuple(kept)

    def begin_round(self, episodes: int, group_size: int) -> None:
        """Draw the prompts of a round of episodes; from now on rows take these.

        :raises ValueError: if the episodes are not whole groups, or fewer than the rows
        """
        if group_size < 1 or episodes < 1 or episodes % group_size:
            raise ValueError(f"episodes={episodes} must be a multiple of group_size={group_size}, both at least 1")
        if episodes < self.num_rows:
            raise ValueError(
                f"episodes={episodes} is less than num_envs={self.num_rows}: rows would never have one; make the "
                "environment with fewer rows, or the round longer"
            )
        groups = range(episodes // group_size)
        prompts = [self.source.sample(self.rngs[group % self.num_rows]) for group in groups]
        self.round = EpisodeRound(prompts, group_size, self.num_rows)

    def take(self, row: int, fixed: PromptRow | None = None) -> FittedPrompt:
        """The next prompt of a row, as the models see it.

        :param fixed: the one that was asked for
        """
        if fixed is not None:
            prompt = fixed
        elif self.round is not None:
            prompt = self.round.take(row)
        else:
            prompt = self.source.sample(self.rngs[row])
        return self.fit(prompt)

    def fit(self, prompt: PromptRow) -> FittedPrompt:
        """A prompt as the models see it, with its ids, cut where they are too many."""
        fitted = self.rules.fit(prompt)
        if fitted.row is not prompt and not self._told_long:
            # Of prompts that are all known it was said when the environment was made.
            self._told_long = self.rules.judge([prompt], self.overflow)
        return fitted

    def read(self, prompt: Any, rows: np.ndarray) -> list[PromptRow | None] | None:
        """The prompts that ``reset(options={"prompt": ...})`` asks for.

        :param prompt: a text or a conversation for all rows, or a list of N, None in it for one that is drawn
        :param rows: ``(B,)``
        :return: of each of these rows; None if nothing was asked for
        :raises TypeError: if it is something else
        :raises ValueError: if a prompt is empty, or there are not N
        """
        if prompt is None:
            return None
        name = "options['prompt']"
        alone = isinstance(prompt, str) or is_one_conversation(prompt)
        several = "" if self.num_rows == 1 else f", or {self.num_rows} of them with None for one that is drawn"
        problem = f"{name}={shown(prompt)} must be a non-empty text or a conversation{several}"
        if not alone and not isinstance(prompt, list | tuple):
            raise TypeError(problem)
        given = [prompt] * self.num_rows if alone else prompt
        if len(given) != self.num_rows:
            raise ValueError(f"{problem}; it has {len(given)} entries")
        made: dict[int, PromptRow | None] = {id(None): None}  # of each object once: one may stand for all rows
        for row, one in enumerate(given):
            if id(one) not in made:
                where = name if alone else f"{name}[{row}]"
                check_start(where, one)
                read = PromptRow(one) if isinstance(one, str) else one
                made[id(one)] = read_prompt(read, where, self.rules.vocabulary.tokenizer)
        return [made[id(given[row])] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Seeds, random states and the round, as plain data."""
        return {
            "seeds": None if self.seeds is None else list(self.seeds),
            "random": [rng.bit_generator.state for rng in self.rngs],
            "told_long": self._told_long,
            "round": None if self.round is None else self.round.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; further entries are not read."""
        self.seeds = None if state["seeds"] is None else tuple(state["seeds"])
        for rng, random_state in zip(self.rngs, state["random"], strict=True):
            rng.bit_generator.state = random_state
        self._told_long = bool(state["told_long"])
        self.round = None if state["round"] is None else EpisodeRound.from_state_dict(state["round"])

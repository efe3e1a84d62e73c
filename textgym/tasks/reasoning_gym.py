"""Questions of reasoning-gym, and its scores of answers; needs the extra ``reasoning-gym``."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from textgym.checks import check_int, check_seed, check_text, shown
from textgym.extras import import_extra
from textgym.rewards.base import Reward
from textgym.rewards.columns import column_of


class ReasoningGym(Reward):
    """Tasks that reasoning-gym generates: :attr:`prompts` are its questions, and the reward is its score of the answer.

    The rows of the prompts have the columns ``task``, ``index`` (the question's number in its task) and ``answer``, one
    right answer, or None where a task knows none. An answer that a task's scorer can't read scores 0.

    Range: [0, 1].

    :param tasks: the name of a task, such as ``"chain_sum"``; or several, each with the settings of its generator:
        ``{"chain_sum": {"max_terms": 3}, "leg_counting": {}}``
    :param size: questions of each
    :param seed: of the questions
    :param prompt: how a question is asked, ``{}`` being the question
    :param answer_tag: the answer is what stands in the last ``<answer_tag>...</answer_tag>``; None for the whole
        completion, without white space around it
    :raises ModuleNotFoundError: if reasoning-gym is not installed
    :raises ValueError: if there is no such task, or a setting is impossible
    """

    def __init__(
        self,
        tasks: str | Mapping[str, Mapping[str, Any]],
        size: int = 500,
        seed: int = 0,
        prompt: str = "{}",
        answer_tag: str | None = None,
    ) -> None:
        factory = import_extra("reasoning_gym.factory", "reasoning-gym", "ReasoningGym")
        chosen = {tasks: {}} if isinstance(tasks, str) else tasks
        if not isinstance(chosen, Mapping) or not chosen:
            raise ValueError(f"tasks={shown(tasks)} must be the name of a task, or a dict of names and their settings")
        check_int("size", size, low=1)
        check_seed("seed", seed)
        if "{}" not in check_text("prompt", prompt):
            raise ValueError(f"prompt={shown(prompt)} must have {{}} where the question goes")
        self._tag: re.Pattern[str] | None = None
        if answer_tag is not None:
            tag = re.escape(check_text("answer_tag", answer_tag, empty=False))
            self._tag = re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL)
        self._tasks: dict[str, Any] = {}
        self._entries: dict[str, list[dict[str, Any]]] = {}
        self.prompts: list[dict[str, Any]] = []
        """A prompt row for each question."""
        for name, settings in chosen.items():
            if name not in factory.DATASETS:
                near = difflib.get_close_matches(str(name), factory.DATASETS, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "reasoning_gym.factory.DATASETS lists them"
                raise ValueError(f"tasks={shown(tasks)}: reasoning-gym has no task {name!r}; {hint}")
            try:
                task = factory.create_dataset(name, seed=seed, size=size, **settings)
                entries = [task[i] for i in range(size)]
            except (AssertionError, TypeError, ValueError) as error:
                raise ValueError(f"tasks: {name!r} does not take {dict(settings)}: {error}") from error
            self._tasks[name], self._entries[name] = task, entries
            self.prompts += [
                {"prompt": prompt.replace("{}", entry["question"]), "task": name, "index": i, "answer": entry["answer"]}
                for i, entry in enumerate(entries)
            ]

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        tasks = column_of(self.name, "task", columns, completions)
        indices = column_of(self.name, "index", columns, completions)
        return [self._score(*row) for row in zip(tasks, indices, completions, strict=True)]

    def _score(self, name: str, index: int, completion: str) -> float:
        answer: str | None = completion.strip()
        if self._tag is not None:
            found = self._tag.findall(completion)
            answer = found[-1].strip() if found else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what some scorers read answers with
            try:
                return float(self._tasks[name].score_answer(answer=answer, entry=self._entries[name][index]))
            except Exception:  # some raise where an answer is not in the form that they read
                return 0.0

"""The held-out prompts of a run: how they are evaluated, which evaluation is the best, and when it is time to stop."""

from __future__ import annotations

from typing import Any

import numpy as np

from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.runs.config import RunConfig
from textgym.envs import TextGenVectorEnv
from textgym.evaluation import Evaluation, evaluate
from textgym.metrics import bootstrap_interval
from textgym.prompts.rows import PromptRow

ENOUGH_TEXTS = 64  # completions in an evaluation; where prompts are fewer, each is completed several times
BEYOND_NOISE = 1.645  # standard errors of a paired difference; by chance it is exceeded in one of twenty comparisons


class HeldOutPrompts:
    """The prompts that a run is evaluated on.

    :param rows: held-out prompts
    :param config: of the run
    """

    def __init__(self, rows: list[PromptRow], config: RunConfig) -> None:
        self.rows = rows[: config.eval_prompts]
        self._asked = config.eval_prompts
        self.completions_per_prompt = 1
        if len(rows) < config.eval_prompts:
            self.completions_per_prompt = -(-min(ENOUGH_TEXTS, config.eval_prompts) // len(self.rows))

    def said(self) -> str | None:
        """What a user may not expect; None where there are as many prompts as asked for."""
        if len(self.rows) >= self._asked:
            return None
        prompts = f"{len(self.rows)} held-out prompt{'s' * (len(self.rows) > 1)}"
        several = f"; each is completed {self.completions_per_prompt} times" if self.completions_per_prompt > 1 else ""
        return f"{prompts}, fewer than eval_prompts={self._asked}{several}"

    def evaluate(self, model: TextOnPolicyAlgorithm, envs: TextGenVectorEnv) -> Evaluation:
        """Complete the prompts, as in training and the same in every evaluation of the same weights."""
        return evaluate(
            model.policy.language_model,
            envs.reference_language_model(),
            envs.reward,
            self.rows,
            envs.sampling,
            reply=envs.reply,
            completions_per_prompt=self.completions_per_prompt,
            seed=0,
        )

    def scores(self, evaluation: Evaluation) -> list[float]:
        """What each prompt's completions are worth in the mean: their scores, and what replies paid."""
        means: list[float] = evaluation.returns.reshape(len(self.rows), -1).mean(1).tolist()
        return means


def held_out_figures(evaluation: Evaluation) -> dict[str, float]:
    """The figures of an evaluation, with a 95 % interval of the score and what a diagnosis looks at."""
    groups = evaluation.prompts if len(set(evaluation.prompts)) > 1 else None
    low, high = bootstrap_interval(evaluation.scores, n_resamples=1000, rng=0, groups=groups)
    figures = {name: float(value) for name, value in evaluation.figures().items()}
    zero = float((evaluation.scores == 0).mean())
    if evaluation.turns is None:
        figures["ended"] = float(evaluation.ended.mean())
    return {**figures, "score_low": low, "score_high": high, "zero": zero}


class BestEvaluation:
    """Which evaluation of a run is the best so far.

    Another one takes its place when its score is higher by more than noise: prompt by prompt, on the same prompts, the
    mean difference exceeds 1.645 of its standard errors. So the best is not the luckiest of many.

    - ``without_better``: evaluations since then
    """

    def __init__(self) -> None:
        self._scores: list[float] | None = None  # of each prompt
        self.without_better = 0

    def take(self, scores: list[float]) -> bool:
        """Compare a new evaluation with the best.

        :param scores: one for each prompt
        :return: whether it is the best now
        """
        if self._scores is not None:
            differences = np.subtract(scores, self._scores)
            error = differences.std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0.0
            if not differences.mean() > BEYOND_NOISE * error:
                self.without_better += 1
                return False
        self._scores, self.without_better = list(scores), 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores, "without_better": self.without_better}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores, self.without_better = state["scores"], state["without_better"]

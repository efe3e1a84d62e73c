"""The decision process that options describe, without Gymnasium: everything an environment is put together from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from textgym.action_masks import ActionMasks
from textgym.chat.between_turns import BetweenTurns
from textgym.checks import check_number
from textgym.envs.calibration import calibrate
from textgym.envs.environment_model import EnvironmentModel
from textgym.envs.episodes import Episodes
from textgym.envs.options import TextGenOptions
from textgym.envs.prompt_stream import PromptStream
from textgym.envs.scoring import Scorer
from textgym.envs.texts import EpisodeTexts
from textgym.prompts.opening import as_prompt_source
from textgym.prompts.rows import PromptRow
from textgym.replies import as_reply
from textgym.rewards import as_reward


class DecisionProcess:
    """Language model, prompts, rules, reward and reply of ``TextGen-v0``, and the episodes of its rows.

    - ``language_model``: opened when its weights are first needed
    - ``rules``: how long prompts and completions are, and where they end
    - ``stream``: the prompts that rows begin with, and what draws them
    - ``episodes``: what stands in each row, and what it earns
    - ``context``: most tokens of a row

    :param options: validated
    :param num_rows: N
    :param max_actions: most tokens that the policy writes in an episode, where that is less than what options allow
    :raises ValueError: if the options do not fit the model or each other
    """

    def __init__(self, options: TextGenOptions, num_rows: int, max_actions: int | None = None) -> None:
        self.options = options
        self.reward = as_reward(options.reward)
        self.language_model = EnvironmentModel(options)
        self.vocabulary = self.language_model.vocabulary()
        source = as_prompt_source(options.prompts, tokenizer=self.vocabulary.tokenizer)
        self.rules = options.episode_rules(self.vocabulary, source.rows, max_actions)
        self.sampling = self.rules.sampling
        longest_prompt, turns = self.sampling.max_prompt_tokens, self.rules.turns
        assert longest_prompt is not None
        budget = options.max_new_tokens if turns is None else turns.max_total_tokens
        self.context = longest_prompt + budget
        reply = None if options.reply is None else as_reply(options.reply)
        if reply is not None and self.sampling.chat:
            BetweenTurns(self.vocabulary.turns).check(reply.role)
        told_long = source.rows is not None and self.rules.judge(source.rows, options.prompt_overflow)
        self.stream = PromptStream(source, self.rules, options.prompt_overflow, told_long, num_rows)
        kl_coef, held = float(options.kl_coef), self.language_model.held
        self.episodes = Episodes(
            EpisodeTexts(num_rows, self.context, self.rules, budget, float(options.missing_eos_penalty), reply),
            Scorer(
                self.reward,
                options.reward_every,
                held if kl_coef > 0 else None,
                options.kl_estimator,
                self.sampling.temperature,
                self.context,
                num_rows,
            ),
            ActionMasks(self.sampling, self.vocabulary, held) if options.action_masking else None,
            kl_coef,
        )

    @property
    def kl_coef(self) -> float:
        """β, the weight of the KL penalty. From the moment it is positive there is a reference model."""
        return self.episodes.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        check_number("kl_coef", value, low=0.0)
        self.episodes.kl_coef = float(value)
        if value > 0 and self.episodes.scorer.reference is None:
            self.episodes.scorer.reference = self.language_model.hold()

    def calibrate(self) -> None:
        """Calibrate the parts of the reward that ask for it, if they haven't been."""
        if self.reward.needs_calibration:
            model, source = self.language_model.open(), self.stream.source
            calibrate(self.reward, model, source, self.sampling, self.stream.fit, self.episodes.texts.reply)

    def begin(self, rows: np.ndarray, fixed: Sequence[PromptRow | None] | None = None) -> None:
        """Start an episode in each of the rows ``(B,)``, from its next prompt or from one that was asked for."""
        prompts = fixed or [None] * len(rows)
        self.episodes.begin(
            rows, [self.stream.take(row, prompt) for row, prompt in zip(rows.tolist(), prompts, strict=True)]
        )

    def let_go(self) -> None:
        """Let go of the models."""
        self.language_model.held = None
        self.episodes.scorer.reference = None

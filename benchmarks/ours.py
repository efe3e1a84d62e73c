"""textgym as a contender, and Stable-Baselines3's own PPO with textgym's policy."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import stable_baselines3 as sb3
import torch
from measures import Clock
from stable_baselines3.common.logger import Logger
from transformers import PreTrainedModel
from workload import GROUP, Workload, language_model, prompt_texts, scalar_model, tokenizer

from textgym.agents import GRPO, PPO, LanguageModelPolicy, TextOnPolicyAlgorithm
from textgym.envs import TextGenVectorEnv
from textgym.language_model import LanguageModel
from textgym.rewards import CausalRewardModel


@dataclass(frozen=True)
class Setting:
    """What a user can set for speed.

    :param policy: ``policy_kwargs``; ``compile`` is left out where the workload forbids it
    :param frozen_dtype: of the weights of reference and reward model
    """

    policy: dict[str, Any] = field(default_factory=dict)
    frozen_dtype: str = "float32"


MIXED = Setting({"rollout_dtype": "bfloat16", "autocast": "bfloat16"}, "bfloat16")
LARGE = 30_000_000  # weights from which on reading them is much of what a decode step takes


def fastest(workload: Workload) -> Setting:
    """What takes least time: everything in bf16 but the master weights, and compiled.

    A small model on a CPU draws its tokens with the fp32 weights: what a copy in bf16 drew has to be evaluated anew
    with the trained weights.
    """
    copy = workload.device != "cpu" or workload.trunk_parameters >= LARGE
    policy = MIXED.policy if copy else {"autocast": "bfloat16"}
    return Setting({**policy, "compile": True}, "bfloat16")


class Textgym:
    """Whole iterations of textgym's PPO, scored at the end of the rollout.

    The trained weights are fp32. In a bf16 workload all else is bf16.

    :param setting: default that of the workload's dtype
    :param scoring: ``deferred``, or ``instant``: each token is scored before the next, which leaves the score no phase
        of its own, and the update is left out
    :param whole_episodes: whether what is trained on is whole completions, as it is for everyone else, where rollouts
        are long enough for that
    :param options: further ones of the environment
    """

    def __init__(
        self,
        workload: Workload,
        setting: Setting | None = None,
        scoring: str = "deferred",
        whole_episodes: bool = True,
        **options: Any,
    ) -> None:
        self.covers = ("rollout", "score", "update") if scoring == "deferred" else ("rollout", "score")
        self.workload = workload
        if setting is None:
            setting = MIXED if workload.dtype == "bfloat16" else Setting()
        policy = {name: value for name, value in setting.policy.items() if name != "compile" or workload.compile}
        words = tokenizer(workload)
        frozen = {"device": workload.device, "dtype": getattr(torch, setting.frozen_dtype)}
        trained = LanguageModel(language_model(workload).to(workload.device), words, "random Llama")
        if setting.frozen_dtype != "float32":
            # The environment's own model is the reference; where it has another type, the policy gets one of its own.
            policy["language_model"] = trained
        self.reference = LanguageModel(language_model(workload).to(**frozen), words, "random Llama")
        self.reward = CausalRewardModel(scalar_model(workload).to(**frozen), words)
        self.envs = TextGenVectorEnv(
            workload.rows,
            language_model=self.reference,
            prompts=prompt_texts(workload, workload.rows),
            reward=self.reward,
            kl_coef=workload.kl_coef,
            max_prompt_tokens=workload.prompt_tokens,
            max_new_tokens=workload.new_tokens,
            # In the fixed work the end-of-sequence token ends nothing.
            min_new_tokens=0 if workload.ragged else workload.new_tokens,
            **options,
        )
        arguments = {
            "learning_rate": workload.lr,
            "batch_size": workload.minibatch_tokens,
            "n_epochs": workload.epochs,
            "scoring": scoring,
            "seed": 0,
            "device": workload.device,
            "policy_kwargs": policy,
        }
        self.model = self.agent(whole_episodes, arguments)
        self.model.set_logger(Logger(None, []))
        self.callback = self.model._setup_learn(10**9)[1]

    def agent(self, whole_episodes: bool, arguments: dict[str, Any]) -> TextOnPolicyAlgorithm:
        """What learns."""
        steps = self.workload.rollout_steps
        whole_episodes = whole_episodes and steps >= self.workload.new_tokens
        return PPO("LanguageModelPolicy", self.envs, n_steps=steps, whole_episodes=whole_episodes, **arguments)

    def iterate(self, clock: Clock) -> dict[str, Any]:
        self.collect(clock)
        if "update" in self.covers:
            self.model.train()
            clock.lap("update")
        lengths = [episode["l"] for episode in self.model.finished_episodes if "l" in episode]
        return {"tokens": self.workload.rows * self.workload.rollout_steps, "completion_lengths": lengths}

    def models(self) -> list[PreTrainedModel]:
        """Policy, reference and reward model."""
        return [self.model.policy.language_model.model, self.reference.model, self.reward.model]

    def collect(self, clock: Clock) -> None:
        """A rollout, whose scoring is a phase of its own."""
        score = TextGenVectorEnv.scores

        def timed_score(*args: Any, **kwargs: Any) -> Any:
            phase = "score" if self.envs.scoring_deferred else "rollout"  # instant scoring was part of the steps
            clock.lap("rollout")
            scores = score(self.envs, *args, **kwargs)
            clock.lap(phase)
            return scores

        self.envs.scores = timed_score  # type: ignore[method-assign]
        self.model.collect_rollouts(self.model.env, self.callback, self.model.rollout_buffer, self.model.n_steps)
        clock.lap("rollout")


class TextgymGroups(Textgym):
    """The same of GRPO: groups of completions for each prompt, and no critic."""

    def agent(self, whole_episodes: bool, arguments: dict[str, Any]) -> TextOnPolicyAlgorithm:
        group = math.gcd(GROUP, self.workload.rows)
        return GRPO("LanguageModelPolicy", self.envs, group_size=group, **arguments)

    def iterate(self, clock: Clock) -> dict[str, Any]:
        answer = super().iterate(clock)
        return {**answer, "tokens": sum(answer["completion_lengths"])}


class StableBaselines3:
    """The update of ``stable_baselines3.PPO`` over single steps, each with a forward of its whole prefix.

    The policy and the rollout are textgym's, and so are, for this rollout, losses and gradients
    (``tests/agents/test_ppo_equals_sb3.py``). It is slow: one minibatch of the first epoch is timed, and the time
    multiplied by the number of optimizer steps.
    """

    covers = ("update",)

    def __init__(self, workload: Workload) -> None:
        ours = Textgym(workload, whole_episodes=False)
        ours.collect(Clock(workload.device))
        agent = ours.model
        buffer = agent.rollout_buffer.as_single_steps()
        self.tokens = buffer.buffer_size * buffer.n_envs
        self.share = workload.epochs * max(1, round(self.tokens / workload.minibatch_tokens))
        minibatches = buffer.get

        def first_only(batch_size: int | None = None) -> Any:
            return itertools.islice(minibatches(batch_size), 1)

        buffer.get = first_only  # type: ignore[method-assign]
        self.agent = sb3.PPO(
            LanguageModelPolicy,
            agent.env,
            learning_rate=workload.lr,
            n_steps=agent.n_steps,
            batch_size=workload.minibatch_tokens,
            n_epochs=1,
            vf_coef=agent.vf_coef,
            max_grad_norm=agent.max_grad_norm,
            policy_kwargs={"language_model": agent.policy.language_model},
            device=workload.device,
        )
        self.agent.rollout_buffer = buffer  # type: ignore[assignment]
        self.agent.set_logger(Logger(None, []))

    def iterate(self, clock: Clock) -> dict[str, Any]:
        self.agent.train()
        clock.lap("update")
        for times in (clock.seconds, clock.cpu):
            times["update"] *= self.share
        return {"tokens": self.tokens, "scaled_by": self.share}


CONTENDERS: dict[str, Callable[[Workload], Any]] = {
    "textgym": Textgym,
    "textgym-compiled": lambda workload: Textgym(workload, Setting({"compile": True})),
    "textgym-fast": lambda workload: Textgym(workload, fastest(workload)),
    "textgym-grpo": TextgymGroups,
    "textgym-instant": functools.partial(Textgym, scoring="instant"),
    "sb3": StableBaselines3,
}

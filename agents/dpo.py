"""Direct preference optimisation: the better of two completions of a prompt is to gain on the worse one.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
https://arxiv.org/abs/2305.18290. The preferences are the environment's: of the K completions of a prompt, those that it
paid most and least for are a pair. Offline, as in the paper, the completions are the reference model's; online, the
current policy's (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback",
https://arxiv.org/abs/2402.04792).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.arguments import ChosenArguments
from textgym.agents.common.losses import Loss, preference_loss
from textgym.agents.common.ranking import best_and_worst, rewards_without_kl
from textgym.agents.common.text_environment import TextEnv, TextEnvironment
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_bool, check_int, check_number
from textgym.envs.segments import Segment
from textgym.generation import sample_tokens
from textgym.language_model import LanguageModel
from textgym.prompts.rows import PromptSource


def check_no_stored_pairs(source: PromptSource) -> None:
    """:raises ValueError: if there are stored preferences beside the prompts, which DPO would not learn from"""
    if source.rows is not None and {"chosen", "rejected"} <= source.rows[0].columns.keys():
        raise ValueError(
            "the prompts have the columns 'chosen' and 'rejected', but DPO learns from pairs of texts that a model "
            "writes here, ranked by the reward, and not from stored ones: learn a reward from those (textgym "
            "train-reward) and give it as reward=; or leave the two columns out (drop_columns=, --drop-column)"
        )


class DPO(TextEpisodeAlgorithm):
    """Pairs ranked by the environment's reward, and the loss −log σ(β (Δ_chosen − Δ_rejected)), Δ = log π − log π_ref.

    Completions are ranked by what the environment pays for them *without* its KL penalty: the loss has β itself. What
    else it pays counts, such as the penalty for a missing end. Further arguments are those of
    :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> from textgym.agents.dpo import DPO
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = DPO("LanguageModelPolicy", vec, group_size=4, beta=0.1, seed=0).learn(8)
        >>> [len(pair) for pair in model.units(model.rollout_buffer)]
        [2]

    :param group_size: completions of each prompt, K, at least 2; the best and the worst of them are a pair
    :param beta: β, how strongly the policy is held to the reference; it takes the place of ``kl_coef``
    :param label_smoothing: probability with which the preference is taken to be the wrong way round (Mitchell 2023,
        https://ericmitchell.ai/cdpo.pdf), 0 to 0.5
    :param offline: True: completions are drawn from the reference model, whatever the policy has learned, so that
        training is what it would be on a fixed set of pairs that was sampled in advance; ``rollout/*`` then tell about
        the reference. False: they are drawn from the policy
    :param min_margin: a pair differs by more than this, in units of the reward; equal completions, up to rounding,
        teach nothing
    :param n_epochs: passes over the pairs of a rollout
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        group_size: int = 2,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        offline: bool = True,
        min_margin: float = 1e-4,
        n_epochs: int = 1,
        **arguments: Unpack[ChosenArguments],
    ) -> None:
        check_int("group_size", group_size, low=2)
        check_number("beta", beta, low=0.0, open_low=True)
        check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
        check_number("min_margin", min_margin, low=0.0)
        check_bool("offline", offline)
        acting = (arguments.get("policy_kwargs") or {}).get("rollout_dtype")
        if offline and acting is not None:
            raise ValueError(
                f"rollout_dtype={acting!r} is what the policy acts in, and with offline=True it does not act: leave it "
                "out, or pass offline=False"
            )
        exploration = arguments.get("exploration")
        if offline and exploration is not None:
            raise ValueError(
                f"exploration={exploration} changes what the policy draws, and with offline=True the reference draws: "
                "leave it out, or pass offline=False"
            )
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.offline = offline
        self.min_margin = min_margin
        super().__init__(
            policy,
            env,
            group_size=group_size,
            n_epochs=n_epochs,
            importance_cap=None,  # pairs are pairs, whoever wrote them
            **arguments,
        )

    def _checked_environment(self, env: VecEnv) -> TextEnvironment:
        environment = super()._checked_environment(env)
        check_no_stored_pairs(environment.prompts)
        return environment

    @property
    def needs_reference(self) -> bool:
        """The loss has it."""
        return True

    def begin_rollout(self, environment: TextEnvironment) -> None:
        """Begin a round."""
        if self.offline:  # nothing cached reaches from one rollout into the next, see _collect
            rows = np.arange(environment.vec_env.num_envs)
            self._reference(environment).cached(self.policy.context).forget(rows)
        super().begin_rollout(environment)

    def draw(self, obs: Any, masks: np.ndarray | None, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the reference model, offline."""
        if not self.offline:
            return super().draw(obs, masks, rows)
        reference = self._reference(self._environment)
        log_probs = self.policy.next_token_log_probs(reference, obs, masks, rows)  # (B, V)
        tokens = sample_tokens(log_probs)
        chosen = log_probs.gather(1, tokens[:, None])  # (B, 1)
        return tokens, torch.zeros_like(chosen), chosen.squeeze(1)

    def _reference(self, environment: TextEnvironment) -> LanguageModel:
        return environment.shared_language_model(self.device)

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """1 for the tokens of chosen completions, -1 for those of rejected ones, 0 for the others."""
        assert self.env is not None
        segments, to_go = self.rewards_to_go(buffer)
        paid = rewards_without_kl(buffer, segments, self._environment.kl_coef)
        marks = best_and_worst(paid, self.group_size, self.min_margin, self.judged(segments))
        self.fill(buffer, segments, np.broadcast_to(marks[:, None], to_go.shape), to_go)
        self.logger.record("rollout/pair_share", self.processes.mean(np.abs(marks)) * self.group_size / 2)

    def units(self, buffer: EpisodeBuffer) -> list[list[Segment]]:
        """Pairs, the chosen completion first."""
        pairs: dict[int, dict[float, Segment]] = {}
        for segment in buffer.segments:
            mark = float(buffer.advantages[segment.start, segment.row])
            if mark:
                pairs.setdefault(segment.episode // self.group_size, {})[mark] = segment
        return [[pairs[group][1.0], pairs[group][-1.0]] for group in sorted(pairs)]

    def _minibatches(self, buffer: EpisodeBuffer) -> Iterator[SegmentSamples]:
        """None at all where a process has no pair, because all learn in the same minibatches."""
        if self.processes.smallest(len(self.units(buffer))):
            yield from super()._minibatches(buffer)

    def loss(self, batch: SegmentSamples) -> Loss:
        """Rafailov et al. 2023, equation 7; figures have the names that TRL gives them."""
        assert batch.ref_log_prob is not None
        _, log_prob, entropy = self.policy.evaluate_segments(batch, entropy_gradient=False)
        number = len(batch.episodes)
        log_pi = self.token_sums(log_prob, batch.rows, number)  # (2P,) chosen and rejected in turn
        log_ref = self.token_sums(batch.ref_log_prob, batch.rows, number)
        chosen, rejected = (self.beta * (log_pi - log_ref)).view(-1, 2).unbind(1)  # (P,) the implicit rewards
        margins = chosen - rejected
        loss = preference_loss(margins, self.label_smoothing)
        figures = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (margins > 0).float().mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": log_pi[::2].mean(),
            "logps/rejected": log_pi[1::2].mean(),
            "entropy_loss": -entropy.mean(),
        }
        return Loss(loss, figures, weight=len(margins))

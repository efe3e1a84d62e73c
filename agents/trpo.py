"""Trust region policy optimisation of a language model: natural gradients, and steps of a bounded KL.

The update is that of sb3-contrib's TRPO, its own code: conjugate gradients, line search and critic. What it asks of a
policy, the distribution and the value in each of M states, comes from one teacher-forced forward over whole segments
instead of M forwards over prefixes. Schulman et al. 2015, "Trust Region Policy Optimization",
https://arxiv.org/abs/1502.05477.

It is an agent for small models. The KL is differentiated twice, through all of ``(M, V)`` log-probabilities and with
plain attention, whose ``(heads, L, L)`` weights are kept, and one update takes dozens of passes over the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.arguments import CriticArguments
from textgym.agents.common.finite import check_gradients, check_loss
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_bool, check_int, check_number
from textgym.language_model import log_distribution

FORBIDDEN = -1e8  # log-probability of masked tokens; infinite ones have no KL that can be differentiated


def _stock() -> Any:
    """sb3-contrib's TRPO."""
    try:
        from sb3_contrib import TRPO as stock
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'TRPO needs the package sb3-contrib: pip install "textgym[contrib]"', name="sb3_contrib"
        ) from error
    return stock


class TRPO(TextOnPolicyAlgorithm):
    """sb3-contrib's TRPO for text environments; needs ``pip install "textgym[contrib]"``.

    The transformer moves by natural gradients, the value head alone by Adam: the value loss does not reach the
    transformer. Arguments have the names and the meaning they have there; further ones are those of
    :class:`~textgym.agents.common.on_policy.TextOnPolicyAlgorithm`; ``batch_size`` is of the value head's updates. ::

        >>> import gymnasium as gym, textgym
        >>> from textgym.agents.trpo import TRPO
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = TRPO("LanguageModelPolicy", vec, n_steps=4, cg_max_steps=2, seed=0).learn(16)
        >>> bool(0 < model.logger.name_to_value["train/kl_divergence_loss"] < model.target_kl)
        True

    :param learning_rate: of the value head
    :param target_kl: most nats per token, averaged over the states of the rollout, that one update may move the policy
    :param cg_max_steps: iterations of conjugate gradients
    :param cg_damping: added to the Fisher matrix's diagonal
    :param line_search_shrinking_factor: steps of the line search are shortened by it, between 0 and 1
    :param line_search_max_iter: how often; after that an update leaves the policy as it was
    :param n_critic_updates: passes of the value head over the rollout
    :param normalize_advantage: over the rollout
    :param sub_sampling_factor: the policy's update looks at every so-manyth token only
    :raises ModuleNotFoundError: without sb3-contrib
    :raises ValueError: in several processes, or if the policy computes in a smaller type or with checkpoints
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        learning_rate: float | Schedule = 1e-3,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        target_kl: float = 0.01,
        sub_sampling_factor: int = 1,
        **arguments: Unpack[CriticArguments],
    ) -> None:
        _stock()
        check_int("cg_max_steps", cg_max_steps, low=1)
        check_number("cg_damping", cg_damping, low=0.0)
        check_number("line_search_shrinking_factor", line_search_shrinking_factor, low=0.0, high=1.0, open_low=True)
        check_int("line_search_max_iter", line_search_max_iter, low=1)
        check_int("n_critic_updates", n_critic_updates, low=1)
        check_bool("normalize_advantage", normalize_advantage)
        check_number("target_kl", target_kl, low=0.0, open_low=True)
        check_int("sub_sampling_factor", sub_sampling_factor, low=1)
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.n_critic_updates = n_critic_updates
        self.sub_sampling_factor = sub_sampling_factor
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            importance_cap=None,  # sb3-contrib's objective has no place for such weights
            **arguments,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.processes.world_size > 1:
            raise ValueError(
                f"TRPO trains in one process, not in {self.processes.world_size}: sb3-contrib's conjugate gradients "
                "exchange nothing; PPO trains in several"
            )
        if self.policy.autocast is not None:
            raise ValueError(f"autocast={self.policy.autocast!r}: second derivatives need full precision; leave it out")
        if self.policy.gradient_checkpointing:
            raise ValueError("gradient_checkpointing=True: second derivatives need what it does not keep; leave it out")

    def train(self) -> None:
        """sb3-contrib's update, over segments."""
        policy, buffer = self.policy, self.rollout_buffer
        optimizer = _CheckedOptimizer(policy.optimizer, lambda norm: check_gradients(norm, 0.0, self.num_timesteps))
        over_segments: Any = _SegmentPolicy(policy, optimizer), _SegmentRollout(buffer)
        self.policy, self.rollout_buffer = over_segments
        try:
            with sdpa_kernel([SDPBackend.MATH]):  # fused attention has no second derivative
                _stock().train(self)
        finally:
            self.policy, self.rollout_buffer = policy, buffer

    # What sb3-contrib's update calls

    def _compute_actor_grad(
        self, kl_div: Tensor, policy_objective: Tensor
    ) -> tuple[list[nn.Parameter], Tensor, Tensor, list[tuple[int, ...]]]:
        """The parameters that the policy depends on, gradients of the objective and of the KL, and their shapes.

        sb3-contrib's own goes backward through all of the transformer once for each of its parameters, and takes those
        with "value" in their names, which some attention layers have, for the critic's.
        """
        learning = [p for p in self.policy.transformer.parameters() if p.requires_grad]
        found = torch.autograd.grad(kl_div, learning, create_graph=True, allow_unused=True)
        used = [(p, gradient) for p, gradient in zip(learning, found, strict=True) if gradient is not None]
        parameters = [p for p, _ in used]
        objective = torch.autograd.grad(policy_objective, parameters, retain_graph=True)
        gradients = torch.cat([gradient.reshape(-1) for gradient in objective])
        # The line search takes no step to where something is not finite, so that nothing would be learned, unnoticed.
        check_loss(-policy_objective.item(), self.processes, self.num_timesteps)
        check_gradients(float(gradients.norm()), 0.0, self.num_timesteps)
        return (
            parameters,
            gradients,
            torch.cat([gradient.reshape(-1) for _, gradient in used]),
            [tuple(p.shape) for p in parameters],
        )

    def hessian_vector_product(
        self, params: list[nn.Parameter], grad_kl: Tensor, vector: Tensor, retain_graph: bool = True
    ) -> Tensor:
        """The damped Fisher matrix times a vector; sb3-contrib's."""
        product: Tensor = _stock().hessian_vector_product(self, params, grad_kl, vector, retain_graph)
        return product


@dataclass(frozen=True)
class _States:
    """M states of a rollout, in place of an observation for each."""

    samples: SegmentSamples
    chosen: slice = field(default_factory=lambda: slice(None))

    def __getitem__(self, chosen: slice) -> _States:
        """sb3-contrib's sub-sampling."""
        return _States(self.samples, chosen)


class _Minibatch(NamedTuple):
    """SB3's ``RolloutBufferSamples``, with states for observations."""

    observations: _States
    actions: Tensor  # (M,)
    old_log_prob: Tensor  # (M,)
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,)


class _SegmentRollout:
    """A rollout as sb3-contrib's update reads it."""

    def __init__(self, buffer: EpisodeBuffer) -> None:
        self._buffer = buffer
        self.values: np.ndarray = buffer.values
        self.returns: np.ndarray = buffer.returns

    def get(self, batch_size: int | None = None) -> Iterator[_Minibatch]:
        for samples in self._buffer.get(batch_size):
            yield _Minibatch(
                _States(samples), samples.actions, samples.old_log_prob, samples.advantages, samples.returns
            )


class _CheckedOptimizer:
    """An optimizer as sb3-contrib's update of the value head uses it, which looks at no gradient.

    :param check: is given the norm of all gradients before a step
    """

    def __init__(self, optimizer: torch.optim.Optimizer, check: Callable[[float], None]) -> None:
        self._optimizer, self._check = optimizer, check
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad

    def step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._check(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        self._optimizer.step()


class _SegmentPolicy:
    """A policy as sb3-contrib's update uses it: everything is teacher-forced, nothing comes from a cache."""

    def __init__(self, policy: LanguageModelPolicy, optimizer: _CheckedOptimizer) -> None:
        self._policy = policy
        self.optimizer = optimizer
        self.transformer = policy.transformer

    def set_training_mode(self, mode: bool) -> None:
        self._policy.set_training_mode(mode)

    def get_distribution(self, states: _States) -> CategoricalDistribution:
        """Over the next token in each state; differentiable twice where gradients are enabled."""
        samples, policy = states.samples, self._policy
        logits = log_distribution(policy.language_model.head(self._hidden(states)), policy.temperature)  # (M, V)
        if samples.action_masks is not None:
            logits = logits.masked_fill(~samples.action_masks[states.chosen], FORBIDDEN)
        return CategoricalDistribution(logits.shape[1]).proba_distribution(logits)

    def predict_values(self, states: _States) -> Tensor:
        """``(M, 1)``; gradients flow into the value head only, sb3-contrib drops the others."""
        with torch.no_grad():
            hidden = self._hidden(states)
        return self._policy._values(hidden)

    def _hidden(self, states: _States) -> Tensor:
        """``(M, H)``"""
        samples, chosen = states.samples, states.chosen
        return self._policy._stepper.hidden_at(
            samples.input_ids, samples.lengths, samples.rows[chosen], samples.positions[chosen], samples.prompt_lengths
        )

"""What the agents that learn from their own rollouts share: hyperparameters, and turns of rollout and update.

An agent derives from :class:`TextOnPolicyAlgorithm` and adds its loss. A rollout is in
:mod:`textgym.agents.common.rollout`, an update in :mod:`textgym.agents.common.update`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from torch import Tensor

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.episode_figures import rollout_figures
from textgym.agents.common.exploration import Exploration, check_exploration
from textgym.agents.common.finite import check_policy
from textgym.agents.common.losses import Loss
from textgym.agents.common.normalisation import normalize_over_rollout
from textgym.agents.common.progress import TrainingProgress
from textgym.agents.common.rollout import CollectingAgent
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.update import Update, explained_variance
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_bool, check_choice, check_int, check_mapping, check_number, check_schedule, check_seed
from textgym.engine.freed_memory import keep_freed_memory
from textgym.envs.segments import Segment
from textgym.handed_on import check_arguments, constructor_parameters

if TYPE_CHECKING:
    from typing_extensions import Self

SCORINGS = ("auto", "deferred", "instant")


class TextOnPolicyAlgorithm(CollectingAgent):
    """A language model that learns from its own rollouts in a text environment.

    An agent overrides :meth:`loss`, and, where they aren't generalised advantage estimates,
    :meth:`compute_advantages`; CONTRIBUTING shows one in 40 lines. Arguments have the names and the meaning they have
    in Stable-Baselines3; a step is a token.

    - ``finished_episodes``: the episodes that ended in the last rollout, each with ``r`` (return), ``l``
      (tokens), ``kl`` (nats), ``score``, ``applies`` (False where the reward was None), ``finish_reason``, ``prompt``
      and ``completion``
    - ``processes``: those that learn together (:mod:`textgym.agents.distributed`), in most cases one alone. Rows are
      each process's own; ``num_timesteps`` counts the tokens of all, and ``ep_info_buffer``, which ``rollout/*`` are
      means of, has everybody's episodes

    :param policy: ``"LanguageModelPolicy"`` or a subclass of
        :class:`~textgym.agents.policy.language_model_policy.LanguageModelPolicy`
    :param env: an id, a Gymnasium environment or vector environment, or a ``VecEnv``
    :param learning_rate: a number, or a function of the remaining progress (1 to 0)
    :param n_steps: tokens per row and rollout, T
    :param batch_size: tokens per minibatch and process, as nearly as whole episodes allow; None for the whole rollout
    :param n_epochs: passes over a rollout
    :param gamma: discount per token
    :param gae_lambda: λ of generalised advantage estimation
    :param normalize_advantage: True: per minibatch, as SB3's PPO; ``"rollout"``: once over the rollout, with the
        biased variance; False: not at all
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: gradients are scaled down to this norm
    :param target_kl: stop the update when the new policy is 1.5 times this far from the old one, in nats per
        token
    :param whiten_rewards: divide the rewards of a rollout by their standard deviation (biased), keeping their mean
    :param bootstrap_truncated: add γ·V(last state) to the last reward where the token budget ran out, as SB3 does
    :param whole_episodes: learn from an episode after the rollout in which it ends, and then from all of it, instead of
        cutting those that still run when a rollout ends. The update reads no text again for its second part, and no
        value stands in for what comes after a cut; but a token may have been drawn with the weights before the last
        update, which only a loss with ratios takes into account. ``n_steps`` must be at least the environment's
        ``max_new_tokens``
    :param scoring: ``"deferred"`` scores a whole rollout at its end, in a few teacher-forced passes;
        ``"instant"`` every token at once; ``"auto"`` defers where nothing between environment and agent looks
        at the rewards. Both give the same rewards, but while it is deferred callbacks see zeros during the
        rollout
    :param exploration: what tokens are drawn from in a rollout, if not from the policy itself:
        :class:`~textgym.agents.Exploration`
    :param importance_cap: where tokens were drawn from another distribution than that of the weights (``exploration``,
        or a copy of the weights in another ``rollout_dtype``), each counts in the loss by the ratio of its
        probabilities under the weights and that distribution, at most this (truncated importance sampling); None for
        no such weights
    :param stats_window_size: episodes that ``rollout/*`` are averaged over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: further arguments of the policy, such as ``value_head`` or a ``language_model`` of
        its own
    :param verbose: 0, 1 or 2
    :param seed: of everything random
    :param device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda:1"`` ...
    :param _init_setup_model: whether to build the networks now
    :raises ValueError: if a hyperparameter is impossible
    """

    _progress: TrainingProgress | None = None  # while learn shows it

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__signature__ = inspect.Signature(list(constructor_parameters(cls).values()))  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        """:raises TypeError: if an argument is given that the agent does not have"""
        check_arguments(cls, arguments)
        return super().__new__(cls)

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int = 32,
        batch_size: int | None = None,
        n_epochs: int = 1,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        normalize_advantage: bool | str = False,
        ent_coef: float = 0.0,
        vf_coef: float = 0.1,
        max_grad_norm: float = 1.0,
        target_kl: float | None = None,
        whiten_rewards: bool = False,
        bootstrap_truncated: bool = False,
        whole_episodes: bool = False,
        scoring: str = "auto",
        exploration: Exploration | None = None,
        importance_cap: float | None = 2.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_schedule("learning_rate", learning_rate)
        check_int("n_steps", n_steps, low=1)
        check_int("n_epochs", n_epochs, low=1)
        if batch_size is not None:
            check_int("batch_size", batch_size, low=1)
        check_number("gamma", gamma, low=0.0, high=1.0)
        check_number("gae_lambda", gae_lambda, low=0.0, high=1.0)
        check_choice("normalize_advantage", normalize_advantage, (True, False, "rollout"))
        check_number("ent_coef", ent_coef)
        check_number("vf_coef", vf_coef, low=0.0)
        check_number("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        if target_kl is not None:
            check_number("target_kl", target_kl, low=0.0, open_low=True)
        check_choice("scoring", scoring, SCORINGS)
        check_exploration(exploration)
        if importance_cap is not None:
            check_number("importance_cap", importance_cap, low=1.0)
        switches = {
            "whiten_rewards": whiten_rewards,
            "bootstrap_truncated": bootstrap_truncated,
            "whole_episodes": whole_episodes,
        }
        for name, switch in switches.items():
            check_bool(name, switch)
        check_int("stats_window_size", stats_window_size, low=1)
        check_mapping("policy_kwargs", policy_kwargs)
        check_int("verbose", verbose, low=0)
        check_seed("seed", seed)
        vec_env = self.make_vec_env(env)
        if vec_env is not None and batch_size is not None and batch_size > n_steps * vec_env.num_envs:
            raise ValueError(
                f"batch_size={batch_size} is more than the rollout has, n_steps * num_envs = "
                f"{n_steps * vec_env.num_envs}: make it smaller, or take more steps or rows"
            )
        if normalize_advantage is True and vec_env is not None and batch_size == 1:
            raise ValueError("batch_size=1 has nothing to normalize_advantage over: pass False or 'rollout'")
        super().__init__(
            policy,
            vec_env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=EpisodeBuffer,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.whiten_rewards = whiten_rewards
        self.bootstrap_truncated = bootstrap_truncated
        self.whole_episodes = whole_episodes
        self.scoring = scoring
        self.exploration = exploration
        self.importance_cap = importance_cap
        if _init_setup_model:
            self._setup_model()

    # Learning

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "OnPolicyAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Collect rollouts and learn from them, as Stable-Baselines3 does.

        On a CPU the process keeps memory that it frees from now on, until its end
        (:func:`~textgym.engine.freed_memory.keep_freed_memory`).

        :param total_timesteps: tokens
        :param callback: one or more callbacks
        :param log_interval: rollouts between two entries of the log
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: begin anew; False goes on where the last call ended
        :param progress_bar: whether to show a bar, or lines where output is kept
            (:class:`~textgym.agents.common.progress.TrainingProgress`)
        :return: this agent
        :raises DivergedError: if a loss, a gradient, a reward, an advantage or a weight is not finite
        """
        try:
            super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        finally:
            if self._progress is not None:
                self._progress.close()
                self._progress = None
        self.check_finite()
        return self

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.device.type == "cpu":
            keep_freed_memory()  # learn() says so
        return super()._setup_learn(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # In the place of SB3's, whose bar stands still while an update runs and counts only this process's rows.
        callback = super()._init_callback(callback, progress_bar=False)
        if progress_bar:
            self._progress = TrainingProgress()
            callback = CallbackList([callback, self._progress])
            callback.init_callback(self)
        return callback

    def check_finite(self) -> None:
        """Find out whether the weights, and what comes of them for a text of the last rollout, are finite.

        :raises DivergedError: if they aren't, or weights are so large that their squares are infinite
        """
        check_policy(self.policy, self.rollout_buffer, self.processes, self.num_timesteps)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log; ``rollout/*`` are means over the last ``stats_window_size`` episodes, KL in nats.

        :param iteration: number of the rollout
        """
        for name, value in self._pending_log.items():
            self.logger.record(name, value)
        self._pending_log = {}
        for name, value in rollout_figures(
            list(self.ep_info_buffer or []), self._environment.sampling.in_turns
        ).items():
            self.logger.record(f"rollout/{name}", value)
        self.logger.record("train/kl_coef", self._environment.kl_coef)
        super().dump_logs(iteration)

    # An update

    def train(self) -> None:
        """Update the policy with the current rollout: ``n_epochs`` passes, an optimizer step on each minibatch."""
        self._update_learning_rate(self.policy.optimizer)
        buffer = self.rollout_buffer
        if self.normalize_advantage == "rollout":
            normalize_over_rollout(buffer, self.processes)
        update = Update(self.policy, self.processes, self.num_timesteps, self.max_grad_norm, self.target_kl)
        self._n_updates += update.run(lambda: self._minibatches(buffer), self.loss, self.n_epochs, self.verbose)
        for name, value in update.figures().items():
            self.logger.record(f"train/{name}", value)
        if self.vf_coef > 0:
            self.logger.record("train/explained_variance", explained_variance(buffer, self.processes))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _minibatches(self, buffer: EpisodeBuffer) -> Iterator[SegmentSamples]:
        """Every process makes as many minibatches; where whole units don't allow that many, all make fewer."""
        units = self.units(buffer)
        tokens = sum(segment.steps for unit in units for segment in unit)
        wished = 1 if self.batch_size is None else max(1, round(tokens / self.batch_size))
        batches = int(self.processes.smallest(min(wished, len(units))))
        yield from buffer.get(tokens / batches, units)

    def units(self, buffer: EpisodeBuffer) -> list[list[Segment]]:
        """Segments that come in one minibatch together; here each by itself."""
        return [[segment] for segment in buffer.segments]

    def loss(self, batch: SegmentSamples) -> Loss:
        """The loss of a minibatch.

        :param batch: B segments with M transitions; ``self.policy.evaluate_segments(batch)`` gives their values,
            log-probabilities and entropies
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss: an agent defines loss(batch)")

    def normalized(self, advantages: Tensor) -> Tensor:
        """``(M,)`` the advantages of a minibatch, normalised over it and those of the other processes if
        ``normalize_advantage`` is True."""
        if self.normalize_advantage is not True:
            return advantages
        count, mean, std = self.processes.moments(advantages)
        return (advantages - mean) / (std + 1e-8) if count > 1 else advantages

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_progress"]

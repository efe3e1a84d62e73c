"""What the agents that learn from their own rollouts share: rollouts, updates and statistics.

An agent derives from :class:`TextOnPolicyAlgorithm` and adds its loss. The rollout loop and the update loop are here
and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from transformers import PreTrainedModel

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.losses import Loss
from textgym.agents.common.progress import TrainingProgress
from textgym.agents.common.saved_agent import SavedAgent
from textgym.agents.common.text_environment import TextEnv, TextEnvironment
from textgym.agents.distributed.processes import Processes
from textgym.agents.policy.blueprint import LanguageModelBlueprint
from textgym.agents.policy.language_model_policy import LanguageModelPolicy, check_spaces
from textgym.checks import check_bool, check_choice, check_int, check_mapping, check_number, check_schedule, check_seed
from textgym.divergence import DivergedError
from textgym.engine.freed_memory import keep_freed_memory
from textgym.engine.micro_batches import micro_batches
from textgym.envs.sb3 import as_vec_env, deferrable
from textgym.envs.segments import Segment
from textgym.language_model import LanguageModel, load_language_model
from textgym.lora import wants_lora
from textgym.rewards import RewardError
from textgym.teacher_forcing import FORWARD_TOKENS, forced_log_probs

if TYPE_CHECKING:
    from typing_extensions import Self

# The square of a larger one is infinite in float32. Where layers normalise, what comes of such weights may be finite.
LARGEST_WEIGHT = 1.8e19
SCORINGS = ("auto", "deferred", "instant")
# Plain numbers that change while an agent learns.
_COUNTERS = (
    "num_timesteps",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_episode_num",
    "_n_updates",
    "_current_progress_remaining",
)


@dataclasses.dataclass
class _TakenSteps:
    """The steps of a rollout that are in the buffer, and what a rollout whose reward failed goes on from.

    :param timesteps: tokens trained on before them
    :param bootstrap: ``(T, N)`` what is added to their rewards
    :param steps: of each row
    :param counted: tokens trained on, these included
    :param drawn: actions, values and log-probabilities of the step whose reward failed; None where it was not a step's
    :param observation: in which they were drawn
    """

    timesteps: int
    bootstrap: np.ndarray
    steps: int = 0
    counted: int = 0
    drawn: tuple[Any, Tensor, Tensor] | None = None
    observation: Any = None


class TextOnPolicyAlgorithm(SavedAgent):
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
    :param importance_cap: where tokens were drawn with a copy of the weights (``rollout_dtype``), each counts in
        the loss by the ratio of its probabilities under the weights and the copy, at most this (truncated importance
        sampling); None for no such weights
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

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"LanguageModelPolicy": LanguageModelPolicy}

    policy: LanguageModelPolicy
    rollout_buffer: EpisodeBuffer
    processes: Processes
    finished_episodes: list[dict[str, Any]]
    exploration: Exploration | None = None  # set by Explore, a callback
    _progress: TrainingProgress | None = None  # while learn shows it
    _environment: TextEnvironment  # below what the agent was given as env
    _last_obs: Any

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
        self.importance_cap = importance_cap
        if _init_setup_model:
            self._setup_model()

    # Environments and the policy that starts from their language model

    @staticmethod
    def make_vec_env(env: TextEnv | None) -> VecEnv | None:
        """The ``VecEnv`` of an id, a Gymnasium environment or vector environment, or a ``VecEnv``."""
        return None if env is None else as_vec_env(env)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return OnPolicyAlgorithm._wrap_env(as_vec_env(env), verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, LanguageModelPolicy):
            raise ValueError(f"policy={self.policy_class.__name__} must be a LanguageModelPolicy")
        self.processes = Processes.join(cpu=self.device.type == "cpu")
        kwargs = dict(self.policy_kwargs)
        if self.env is not None:
            environment = self._environment = self._checked_environment(self.env)
            kwargs.setdefault("temperature", environment.temperature)
            kwargs["sampling"] = environment.sampling
            if wants_lora(kwargs.get("lora")):
                self._share_language_model(environment, kwargs)
            elif "language_model" not in kwargs:
                kwargs["language_model"] = environment.policy_language_model(self.device)
            elif isinstance(kwargs["language_model"], LanguageModel | PreTrainedModel):
                # Most likely the object that the environment was made with, too: its reference must not learn.
                given = load_language_model(kwargs["language_model"], tokenizer=kwargs.pop("tokenizer", None))
                kwargs["language_model"] = given.with_model(copy.deepcopy(given.model))
        elif "language_model" not in kwargs:
            raise ValueError("env=None: give an environment, whose language model the policy starts from")
        self.policy_kwargs = kwargs
        self.finished_episodes = []
        self._unscored: _TakenSteps | None = None  # of a rollout whose reward failed
        self._pending_log: dict[str, Any] = {}  # of a resumed run: what the last update before the stop recorded
        super()._setup_model()
        if self.env is not None:
            self._sample_as(environment)
        self._all_rows = int(self.processes.total(self.n_envs))
        self.processes.take(self.policy)
        # What is saved with the agent: no path of this machine, no weights a second time.
        kwargs = {name: value for name, value in kwargs.items() if name != "tokenizer"}
        self.policy_kwargs = {**kwargs, "language_model": self.policy.blueprint()}
        if "lora" in kwargs:
            self.policy_kwargs["lora"] = self.policy.lora  # plain data

    def _share_language_model(self, environment: TextEnvironment, kwargs: dict[str, Any]) -> None:
        """With an adapter nobody's weights change, so the policy gets the environment's model and no copy of it."""
        given = kwargs.get("language_model")
        if given is None:
            kwargs["language_model"] = environment.shared_language_model(self.device)
        elif isinstance(given, LanguageModelBlueprint):
            # A loaded agent: while it is rebuilt its weights are still to come, and most likely they are these.
            shared = environment.shared_language_model(self.device)
            if dataclasses.replace(LanguageModelBlueprint.of(shared), name=given.name) == given:
                kwargs["language_model"] = shared

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything random; in several processes each gets a seed of its own.

        :param seed: the same in every process
        """
        super().set_random_seed(self.processes.seed(seed))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Go on in another environment, with as many rows and the same spaces.

        :param env: whatever the constructor takes
        :param force_reset: whether to begin new episodes
        """
        vec_env = as_vec_env(env)
        environment = self._checked_environment(vec_env)
        super().set_env(vec_env, force_reset)
        self._environment = environment
        self._sample_as(environment)
        self.policy_kwargs = {**self.policy_kwargs, "sampling": environment.sampling}

    def _sample_as(self, environment: TextEnvironment) -> None:
        """Let the policy generate texts as the agent learns them."""
        self.policy.sampling = environment.sampling
        self.policy.reference = environment.reference_language_model() if environment.sampling.restricted else None

    def _checked_environment(self, env: VecEnv) -> TextEnvironment:
        check_spaces(env.observation_space, env.action_space)
        environment = TextEnvironment(env)
        if self.whole_episodes and self.n_steps < environment.max_new_tokens:
            raise ValueError(
                f"n_steps={self.n_steps} is less than the environment's max_new_tokens={environment.max_new_tokens}: "
                "with whole_episodes=True a rollout could end no episode, and have nothing to learn from"
            )
        temperature = self.policy_kwargs.get("temperature", environment.temperature)
        if temperature != environment.temperature:
            raise ValueError(
                f"the policy's temperature={temperature} is not the environment's {environment.temperature}: "
                "the KL to the reference would compare different distributions; set it in the environment"
            )
        if self.scoring == "deferred" and deferrable(env) is None:
            raise ValueError(
                "scoring='deferred' needs the bare text vector environment: a wrapper, or an environment "
                "made of single ones, looks at every reward and would see zeros; use 'auto' or 'instant'"
            )
        return environment

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """See :meth:`LanguageModelPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.device.type == "cpu":
            keep_freed_memory()
        return super()._setup_learn(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # In the place of SB3's, whose bar stands still while an update runs and counts only this process's rows.
        callback = super()._init_callback(callback, progress_bar=False)
        if progress_bar:
            self._progress = TrainingProgress()
            callback = CallbackList([callback, self._progress])
            callback.init_callback(self)
        return callback

    # Rollouts

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: EpisodeBuffer, n_rollout_steps: int
    ) -> bool:
        """Take ``n_rollout_steps`` steps of every row and fill the buffer, advantages included.

        :param env: the training environment
        :param callback: told about every step, and about the beginning and the end
        :param rollout_buffer: emptied and filled
        :param n_rollout_steps: T
        :return: whether training goes on; False where a callback stopped it, then the rollout is incomplete
        :raises DivergedError: if something in it is not finite
        :raises RewardError: if the reward fails; the next call then goes on with these steps. In single environments it
            begins anew, as some of them have taken a step that others have not
        """
        environment = self._environment
        taken, self._unscored = self._unscored, None
        if taken is not None and not self._goes_on(taken, environment):
            taken = None
        if taken is None:
            environment.begin_rollout(self.scoring, np.asarray(self._last_episode_starts, dtype=bool))
        try:
            taken, whole = self._taken(taken, environment, callback, rollout_buffer, n_rollout_steps)
            if whole:
                self._finish_rollout(environment, rollout_buffer, taken)
        except BaseException as error:
            if self._unscored is None:
                environment.end_rollout()  # an interrupt must not leave an environment behind that pays zeros
            if isinstance(error, DivergedError) and error.timesteps is None:
                raise DivergedError(error.what, self.num_timesteps) from error
            raise
        environment.end_rollout()
        if whole:
            callback.update_locals(locals())
            callback.on_rollout_end()
        return whole

    def _goes_on(self, taken: _TakenSteps, environment: TextEnvironment) -> bool:
        """Whether a rollout whose reward failed is the one that the environment is in."""
        return taken.observation is self._last_obs and (taken.drawn is not None or environment.steps_waiting > 0)

    def _taken(
        self,
        taken: _TakenSteps | None,
        environment: TextEnvironment,
        callback: BaseCallback,
        rollout_buffer: EpisodeBuffer,
        n_rollout_steps: int,
    ) -> tuple[_TakenSteps, bool]:
        """The steps of a rollout, and whether they are all: False where a callback stopped it.

        :param taken: the steps that are in the buffer already, if the reward of this rollout has failed before
        """
        if taken is None:
            taken = self._begun_rollout(environment, callback, rollout_buffer)
        elif taken.drawn is None:
            return taken, True  # only their scores are missing
        else:
            self.num_timesteps = taken.counted
        return taken, self._take_steps(taken, environment, callback, rollout_buffer, n_rollout_steps)

    def _finish_rollout(self, environment: TextEnvironment, rollout_buffer: EpisodeBuffer, taken: _TakenSteps) -> None:
        """Put what the steps earned, and what agents learn from it, into the buffer."""
        self.num_timesteps = taken.timesteps + int(self.processes.total(rollout_buffer.taken))
        acted_with_copy = self.policy.rollout_dtype is not None
        if acted_with_copy:
            self._evaluate_anew(rollout_buffer)
        if rollout_buffer.drawn_with is not None:
            self._weigh(rollout_buffer, rollout_buffer.fix_drawn_with())
        new = slice(rollout_buffer.held_steps, rollout_buffer.pos)
        try:
            scores = environment.scores(rollout_buffer.log_probs[new] if acted_with_copy else None)
        except RewardError as error:
            self._keep(taken, environment, error)
            raise
        earlier = len(scores.rewards) - taken.steps  # steps of a rollout before, whose reward had failed
        rollout_buffer.rewards[new] = scores.rewards[earlier:]
        rollout_buffer.kl[new] = scores.kl[earlier:]
        self._note_finished([{**e, "step": e["step"] - earlier + new.start} for e in scores.episodes])
        if self.whole_episodes:
            rollout_buffer.hold(~np.asarray(self._last_episode_starts, dtype=bool))
        if self.needs_reference:
            rollout_buffer.ref_log_probs = self._reference_log_probs(
                environment, rollout_buffer, scores.ref_log_prob[earlier:]
            )
        self._check_rollout(rollout_buffer, "log_probs", "values", "rewards")
        if self.whiten_rewards:
            active = rollout_buffer.active
            rollout_buffer.rewards[active] = whitened(rollout_buffer.rewards[active], self.processes)
        # V is on the scale of whitened rewards, so it is added after whitening.
        rollout_buffer.rewards += taken.bootstrap
        with np.errstate(over="ignore", invalid="ignore"):  # the check says what came of it
            self.compute_advantages(rollout_buffer, self._last_values())
        self._check_rollout(rollout_buffer, "advantages", "returns")
        if self.processes.world_size > 1:
            self._remember(self.processes.interleaved(_figures_of(self.finished_episodes)))

    def _begun_rollout(
        self, environment: TextEnvironment, callback: BaseCallback, rollout_buffer: EpisodeBuffer
    ) -> _TakenSteps:
        """A rollout of which no step was taken."""
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        # Nothing cached reaches from one rollout into the next: a run resumed between two of them is the same run.
        environment.forget_cached()
        self.policy.forget_cached()
        self.policy.optimizer.zero_grad()  # those of the last update are no use any more, and take memory
        self.finished_episodes = []
        taken = _TakenSteps(self.num_timesteps, np.zeros_like(rollout_buffer.rewards))
        callback.on_rollout_start()
        self.begin_rollout(environment)
        return taken

    def _take_steps(
        self,
        taken: _TakenSteps,
        environment: TextEnvironment,
        callback: BaseCallback,
        rollout_buffer: EpisodeBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Take the steps of a rollout that are not taken yet; False where a callback stopped it."""
        assert self._last_episode_starts is not None
        reordered = self.policy.acting_model.reordered_weights(self.n_envs, n_rollout_steps)

        while taken.steps < n_rollout_steps:
            numbers = environment.episode_numbers
            if numbers is not None and (numbers < 0).all():
                rollout_buffer.finish()
                break
            masks = self.action_masks(environment)
            if taken.drawn is None:
                with reordered:
                    taken.drawn = self._act(masks, numbers)
            actions, values, log_probs = taken.drawn
            try:
                new_obs, rewards, dones, infos = environment.step(actions, log_probs.cpu().numpy())
            except BaseException as error:
                reordered.forget()
                self._keep(taken, environment, error)
                raise
            taken.drawn = None

            self.num_timesteps += self._all_rows if numbers is None else self._count_of_all(numbers >= 0)
            step = rollout_buffer.pos
            rollout_buffer.add(
                self._last_obs, actions, rewards, self._last_episode_starts, values, log_probs, masks, numbers
            )
            if self.bootstrap_truncated:
                taken.bootstrap[step] = self.gamma * self._values_where_truncated(dones, infos)
            # Before the callback, unlike SB3: a rollout that a callback stops can be gone on from.
            self._last_obs, self._last_episode_starts = new_obs, dones

            callback.update_locals(locals())
            if not callback.on_step():
                reordered.forget()
                self._note_finished(environment.scores().episodes)
                return False
            taken.steps += 1

        reordered.forget()  # callbacks have it among their locals
        return True

    def _keep(self, taken: _TakenSteps, environment: TextEnvironment, error: BaseException) -> None:
        """After an error of a step, or of its scores: let the next rollout go on with it, or begin anew."""
        if environment.rows is None:
            self._last_obs = None  # of single environments some have taken the step
        elif isinstance(error, RewardError):
            taken.counted, taken.observation = self.num_timesteps, self._last_obs
            self._unscored = taken
        if isinstance(error, RewardError):
            self.num_timesteps = taken.timesteps  # tokens count once they are scored

    # What agents may do in another way

    @property
    def needs_reference(self) -> bool:
        """Whether minibatches are to have the reference model's log-probabilities."""
        return False

    def begin_rollout(self, environment: TextEnvironment) -> None:
        """Before the first step of a rollout; the rows go on where they are."""

    def draw(self, obs: Any, masks: np.ndarray | None, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The next tokens ``(B,)``, with values ``(B, 1)`` and log-probabilities ``(B,)``; here the policy's.

        :param obs: observations of B rows
        :param masks: ``(B, V)`` bool, from :meth:`action_masks`
        :param rows: ``(B,)`` which rows they are; default 0 to B-1
        """
        if self.exploration is None:
            return self.policy(obs, action_masks=masks, rows=rows)
        return self._explore(self.exploration, obs, masks, np.arange(len(obs["input_ids"])) if rows is None else rows)

    def extra_state(self) -> dict[str, Any]:
        """What an exact checkpoint needs besides policy, optimizer and environment, as tensors and plain data."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`extra_state` gave."""

    def action_masks(self, environment: TextEnvironment) -> np.ndarray | None:
        """``(N, V)`` bool, the tokens that may be drawn in the current states; None where all may."""
        return environment.action_masks() if environment.masking else None

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """Fill the buffer's ``advantages`` and ``returns``; here with generalised advantage estimates.

        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".

        :param buffer: with rewards, values and ``episode_starts``
        :param last_values: ``(N, 1)`` V of the states after the last step
        """
        assert self._last_episode_starts is not None
        buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)

    def loss(self, batch: SegmentSamples) -> Loss:
        """The loss of a minibatch.

        :param batch: B segments with M transitions; ``self.policy.evaluate_segments(batch)`` gives their values,
            log-probabilities and entropies
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss: an agent defines loss(batch)")

    def units(self, buffer: EpisodeBuffer) -> list[list[Segment]]:
        """Segments that come in one minibatch together; here each by itself."""
        return [[segment] for segment in buffer.segments]

    # Updates

    def train(self) -> None:
        """Update the policy with the current rollout: ``n_epochs`` passes, an optimizer step on each minibatch."""
        self._update_learning_rate(self.policy.optimizer)
        buffer = self.rollout_buffer
        if self.normalize_advantage == "rollout":
            advantages = buffer.advantages[buffer.active]
            centred = advantages - self.processes.mean(advantages)
            buffer.advantages[buffer.active] = centred / (np.sqrt(self.processes.variance(centred)) + 1e-8)
        figures: dict[str, list[float]] = {}
        grad_norms: list[float] = []
        ratio_first: float | None = None
        go_on = True
        self.processes.begin_update()
        for epoch in range(self.n_epochs):
            figures["approx_kl"] = []  # of the last epoch alone, as in SB3
            for batch in self._minibatches(buffer):
                self.policy.optimizer.zero_grad()  # before the forward: old gradients beside activations are the peak
                loss = self.loss(batch)
                for name, value in {**loss.figures, "loss": loss.value}.items():
                    figures.setdefault(name, []).append(value.item() if isinstance(value, Tensor) else float(value))
                self._check_loss(figures["loss"][-1])
                if ratio_first is None and "ratio_first" in loss.figures:
                    ratio_first = float(loss.figures["ratio_first"])
                weight = len(batch.actions) if loss.weight is None else loss.weight
                if self.target_kl is not None and self._too_far(figures["approx_kl"], weight, epoch):
                    go_on = False
                    break
                self.processes.backward(loss.value, self.policy, weight)
                grad_norms.append(self.processes.clip_gradients(self.policy, self.max_grad_norm))
                self._check_gradients(grad_norms[-1], figures["loss"][-1])
                self.policy.optimizer.step()
            self._n_updates += 1
            if not go_on:
                break
        self.processes.end_update()
        self._record_update(figures, grad_norms, ratio_first)

    # Divergence: it ends training before it reaches the weights, or what is kept of them

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

    def check_finite(self) -> None:
        """Find out whether the weights, and what comes of them for a text of the last rollout, are finite.

        :raises DivergedError: if they aren't, or weights are so large that their squares are infinite
        """
        problem = None
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad and parameter.numel():
                largest = max(map(abs, torch.stack(parameter.detach().aminmax()).tolist()))  # NaN where one weight is
                if not largest < LARGEST_WEIGHT:
                    what = f"are as large as {largest:.0e}" if np.isfinite(largest) else "are not finite"
                    problem = f"the weights {name} {what}"
                    break
        segments = self.rollout_buffer.segments
        if problem is None and segments and not self.processes.shard:
            with torch.no_grad():
                values, log_prob, _ = self.policy.evaluate_segments(self.rollout_buffer.samples(segments[:1]))
            if not (torch.isfinite(values).all() and torch.isfinite(log_prob).all()):
                problem = "what the policy says of a text is not finite"
        if self.processes.any(problem is not None):
            raise DivergedError(problem or "another process found something that is not finite", self.num_timesteps)

    def _check_rollout(self, buffer: EpisodeBuffer, *names: str) -> None:
        """:raises DivergedError: if one of these arrays of the buffer is not finite where it is learned from"""
        for name in names:
            if not np.isfinite(getattr(buffer, name)[buffer.active]).all():
                raise DivergedError(f"{name.replace('_', '-')} of the rollout are not finite", self.num_timesteps)

    def _check_loss(self, loss: float) -> None:
        """:raises DivergedError: if it is not finite; of several processes all find out by their gradients"""
        if self.processes.world_size == 1 and not np.isfinite(loss):
            raise DivergedError(f"the loss is {loss}", self.num_timesteps)

    def _check_gradients(self, norm: float, loss: float) -> None:
        """:raises DivergedError: if the norm of the gradients, which is the same in all processes, is not finite"""
        if not np.isfinite(norm):
            what = f"the loss is {loss}" if not np.isfinite(loss) else f"the norm of the gradients is {norm}"
            raise DivergedError(what, self.num_timesteps)

    def _minibatches(self, buffer: EpisodeBuffer) -> Iterator[SegmentSamples]:
        """Every process makes as many minibatches; where whole units don't allow that many, all make fewer."""
        units = self.units(buffer)
        tokens = sum(segment.steps for unit in units for segment in unit)
        wished = 1 if self.batch_size is None else max(1, round(tokens / self.batch_size))
        batches = int(self.processes.smallest(min(wished, len(units))))
        yield from buffer.get(tokens / batches, units)

    def _too_far(self, approx_kls: list[float], weight: float, epoch: int) -> bool:
        """Whether the newest minibatch says that the policy went beyond ``target_kl``."""
        assert self.target_kl is not None
        if not approx_kls:
            raise ValueError(f"target_kl={self.target_kl}: {type(self).__name__} has no ratio of policies to stop at")
        approx_kl = self.processes.weighted_mean(approx_kls[-1], weight)
        if not np.isfinite(approx_kl):
            raise DivergedError(f"the KL to the policy before the update is {approx_kl}", self.num_timesteps)
        if approx_kl <= 1.5 * self.target_kl:
            return False
        if self.verbose >= 1 and self.processes.is_main:
            print(f"Early stopping in epoch {epoch} due to reaching max kl: {approx_kl:.2f}")
        return True

    def _record_update(
        self, figures: dict[str, list[float]], grad_norms: list[float], ratio_first: float | None
    ) -> None:
        """Log what an update was like."""
        figures.pop("ratio_first", None)
        means = {name: values[-1] if name == "loss" else np.mean(values) for name, values in figures.items() if values}
        for name, value in self.processes.means(means).items():
            self.logger.record(f"train/{name}", value)
        buffer = self.rollout_buffer
        if self.vf_coef > 0:
            returns, values = buffer.returns[buffer.active], buffer.values[buffer.active]
            variance, residual = self.processes.variance(returns), self.processes.variance(returns - values)
            self.logger.record("train/explained_variance", float(1 - residual / variance) if variance else np.nan)
        if ratio_first is not None:
            self.logger.record("train/ratio_first", self.processes.largest(ratio_first))
        if grad_norms:
            self.logger.record("train/grad_norm", np.mean(grad_norms))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def normalized(self, advantages: Tensor) -> Tensor:
        """``(M,)`` the advantages of a minibatch, normalised over it and those of the other processes if
        ``normalize_advantage`` is True."""
        if self.normalize_advantage is not True:
            return advantages
        count, mean, std = self.processes.moments(advantages)
        return (advantages - mean) / (std + 1e-8) if count > 1 else advantages

    # Parts of a rollout

    def _act(self, masks: np.ndarray | None, numbers: np.ndarray | None) -> tuple[np.ndarray, Tensor, Tensor]:
        """Actions, values and log-probabilities in the current states, ``(N,)`` each; 0 where a row waits."""
        if numbers is None or (numbers >= 0).all():
            tokens, values, log_probs = self.draw(self._last_obs, masks)
            return tokens.cpu().numpy(), values.flatten(), log_probs
        rows = np.flatnonzero(numbers >= 0)
        obs = {name: array[rows] for name, array in self._last_obs.items()}
        masks = None if masks is None else masks[rows]
        tokens, values, log_probs = self.draw(obs, masks, rows)
        actions = np.zeros(len(numbers), dtype=np.int64)
        actions[rows] = tokens.cpu().numpy()
        every = torch.zeros((2, len(numbers)), device=values.device)
        every[0, rows], every[1, rows] = values.flatten(), log_probs.to(every.dtype)
        return actions, every[0], every[1]

    def _explore(
        self, exploration: Exploration, obs: Any, masks: np.ndarray | None, rows: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`draw`, from other than the policy's own distribution; the buffer notes from what."""
        assert self.env is not None
        reference = None
        if exploration.reference_share > 0:
            model = self._environment.shared_language_model(self.device)
            reference = self.policy.next_token_log_probs(model, obs, masks, rows)
        drawn_from: list[Tensor] = []

        def behaviour(log_probs: Tensor) -> Tensor:
            drawn_from.append(exploration.log_probs(log_probs, reference))
            return drawn_from[0]

        tokens, values, log_probs = self.policy(obs, action_masks=masks, rows=rows, behaviour=behaviour)
        chosen = drawn_from[0].gather(1, tokens[:, None]).squeeze(1)
        self.rollout_buffer.note_drawn_with(rows, chosen.float().cpu().numpy())
        return tokens, values, log_probs

    def _count_of_all(self, active: np.ndarray) -> int:
        """About how many tokens all processes wrote in this step; the sum at the end of the rollout is exact."""
        return round(int(active.sum()) * self._all_rows / len(active))

    def _last_values(self) -> Tensor:
        """``(N, 1)`` V of the texts that go on behind the rollout; 0 where another begins, which no step leads to.

        None is asked for where no step of them is learned from yet.
        """
        assert self._last_obs is not None
        assert self._last_episode_starts is not None
        begun = np.asarray(self._last_episode_starts, dtype=bool)
        values = torch.zeros(len(begun), 1, device=self.device)
        rows = np.flatnonzero(~begun)
        if len(rows) and not self.whole_episodes:
            values[rows] = self._values_of({name: o[rows] for name, o in self._last_obs.items()}, rows)
        return values

    def _values_where_truncated(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """``(N,)`` V of the last observation of episodes whose budget ran out, 0 elsewhere (SB3 issue
        #633)."""
        values = np.zeros(len(dones), dtype=np.float32)
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool)
        rows = np.flatnonzero(dones & truncated)
        if len(rows):
            last = [infos[row]["terminal_observation"] for row in rows]
            obs = {name: np.stack([o[name] for o in last]) for name in last[0]}
            values[rows] = self._values_of(obs, rows).flatten().cpu().numpy()
        return values

    def _values_of(self, obs: dict[str, np.ndarray], rows: np.ndarray) -> Tensor:
        """``(B, 1)`` V of the trained weights for observations of some rows."""
        exact = self.policy.rollout_dtype is not None  # else what acts, and has cached most of it, are the weights
        return self.policy.forced_values(obs) if exact else self.policy.predict_values(obs, rows)

    @torch.no_grad()
    def _evaluate_anew(self, buffer: EpisodeBuffer) -> None:
        """Put the trained weights' log-probabilities and values in the place of those of the copy that acted."""
        buffer.fix_drawn_with()
        for part in _in_parts(buffer.segments):
            values, log_prob, _ = self.policy.evaluate_segments(buffer.samples(part))
            at = buffer.places(part)
            buffer.values[at] = values.flatten().cpu().numpy()
            buffer.log_probs[at] = np.minimum(log_prob.cpu().numpy(), 0.0)  # a sure token may come out at +1e-7

    def _weigh(self, buffer: EpisodeBuffer, drawn_with: np.ndarray) -> None:
        """Weigh tokens by their probability under the policy over that under what they were drawn from."""
        log_ratio = np.where(buffer.active, buffer.log_probs - drawn_with, 0.0).astype(np.float32)
        if self.importance_cap is not None:
            buffer.importance = np.minimum(np.exp(log_ratio), self.importance_cap)
        self.logger.record("rollout/log_ratio_abs", self.processes.mean(np.abs(log_ratio)))
        self.logger.record("rollout/log_ratio_max", self.processes.largest(np.abs(log_ratio).max()))

    def _reference_log_probs(
        self, environment: TextEnvironment, buffer: EpisodeBuffer, known: np.ndarray
    ) -> np.ndarray:
        """``(T, N)`` log-probabilities, in nats, of the buffer's actions under the reference model.

        :param known: ``(S, N)`` of the newest S steps, as scoring them needed it; NaN where it didn't
        """
        log_probs = np.zeros_like(buffer.log_probs)
        log_probs[buffer.held_steps : buffer.pos] = known
        segments = buffer.segments
        steps, rows = buffer.places(segments)
        if not buffer.held_steps and np.isfinite(log_probs[steps, rows]).all():
            return np.nan_to_num(log_probs)
        batch = buffer.samples(segments, with_masks=False)

        def allowed(which: np.ndarray) -> np.ndarray:
            masks = buffer.masks_at(steps[which], rows[which])
            assert masks is not None
            return masks

        log_probs[steps, rows] = forced_log_probs(
            environment.shared_language_model(self.device),
            self.policy.context,
            batch.input_ids,
            batch.lengths,
            batch.prompt_lengths,
            batch.rows,
            batch.positions,
            buffer.actions[steps, rows, 0],
            self.policy.temperature,
            None if buffer.packed_masks is None else allowed,
        )
        return np.nan_to_num(log_probs)

    # Statistics

    def _note_finished(self, episodes: list[dict[str, Any]]) -> None:
        self.finished_episodes.extend(episodes)
        if self.processes.world_size == 1:  # else with the others' episodes, at the end of the rollout
            self._remember(_figures_of(episodes))

    def _remember(self, figures: list[dict[str, Any]]) -> None:
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.extend(figures)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log; ``rollout/*`` are means over the last ``stats_window_size`` episodes, KL in nats.

        :param iteration: number of the rollout
        """
        for name, value in self._pending_log.items():
            self.logger.record(name, value)
        self._pending_log = {}
        episodes = list(self.ep_info_buffer or [])

        def values(name: str) -> np.ndarray:
            return np.array([e.get(name, np.nan) for e in episodes], dtype=np.float64)

        kl, score = values("kl"), values("score")
        if np.isfinite(kl).any():
            known = np.isfinite(kl)
            self.logger.record("rollout/kl_ref", kl[known].mean())
            self.logger.record("rollout/kl_ref_per_token", kl[known].sum() / values("l")[known].sum())
        if np.isfinite(score).any():
            self.logger.record("rollout/score_mean", np.nanmean(score))
        reasons = [e["finish_reason"] for e in episodes if "finish_reason" in e]
        if reasons:
            self.logger.record("rollout/eos_rate", np.mean([reason == "eos" for reason in reasons]))
        successes = values("is_success")  # SB3's name for what some environments and wrappers say at an episode's end
        if np.isfinite(successes).any():
            self.logger.record("rollout/success_rate", np.nanmean(successes))
        assert self.env is not None
        self.logger.record("train/kl_coef", self._environment.kl_coef)
        super().dump_logs(iteration)

    # Saving

    @property
    def has_begun(self) -> bool:
        """Whether there was a first observation, so that there is a state to keep."""
        return self._last_obs is not None

    def state_dict(self) -> dict[str, Any]:
        """What the agent itself has to keep between two rollouts for training to go on exactly, as tensors and plain
        data. Weights that don't learn, such as those beside an adapter, are not among it.

        Where the environment stands, random states and callbacks belong to a checkpoint, too:
        :mod:`textgym.agents.callbacks.checkpoints`.
        """
        frozen = self._frozen()
        return {
            "agent": type(self).__name__,
            "policy": {name: tensor for name, tensor in self.policy.state_dict().items() if name not in frozen},
            "optimizer": self.policy.optimizer.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS if hasattr(self, name)},
            "finished_episodes": [dict(episode) for episode in self.ep_info_buffer or []],
            "last_episode_starts": np.asarray(self._last_episode_starts),
            "held": self.rollout_buffer.state_dict(),
            "extra": self.extra_state(),
            # What the last update recorded is written with the next rollout's figures.
            "log": dict(self.logger.name_to_value),
        }

    def load_state_dict(self, state: dict[str, Any], observation: Any) -> None:
        """Go on from what :meth:`state_dict` gave.

        :param state: of an agent made like this one
        :param observation: the environment's, where it stands by now
        :raises ValueError: if the policy has other weights
        """
        wrong = set(state["policy"]) ^ (set(self.policy.state_dict()) - self._frozen())
        if wrong:
            raise ValueError(f"the state's policy has other weights than this one; they differ in {sorted(wrong)[:3]}")
        self.policy.load_state_dict(state["policy"], strict=False)
        self.policy.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.ep_info_buffer = deque(state["finished_episodes"], maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        self._last_obs = observation
        self._last_episode_starts = np.asarray(state["last_episode_starts"])
        self.rollout_buffer.load_state_dict(state.get("held", {}))
        self.load_extra_state(state["extra"])
        self._pending_log = state["log"]

    def _frozen(self) -> set[str]:
        """Weights that don't learn, such as those beside an adapter: they are where the model was opened from."""
        parameters = self.policy.named_parameters(remove_duplicate=False)
        return {name for name, parameter in parameters if not parameter.requires_grad}

    def _excluded_save_params(self) -> list[str]:
        own = [
            "_progress",
            "exploration",
            "finished_episodes",
            "_pending_log",
            "_unscored",
            "processes",
            "_all_rows",
            "_environment",
        ]
        return [*super()._excluded_save_params(), *own]


def _in_parts(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Segments of like length together, so few that a forward over them fits."""
    for part in micro_batches([segment.length for segment in segments], FORWARD_TOKENS):
        yield [segments[i] for i in part]


def _figures_of(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``rollout/*`` are made of; without the texts, because they are saved with the agent."""
    names = ("r", "l", "score", "kl", "finish_reason", "is_success")
    return [{n: e[n] for n in names if n in e} for e in episodes if "r" in e]


def whitened(rewards: np.ndarray, processes: Processes | None = None) -> np.ndarray:
    """Rewards of unit variance with their mean kept; the variance is the biased one.

    From Ziegler et al.'s code, see "The N Implementation Details of RLHF with PPO" (Huang et al. 2023).

    :param rewards: any shape
    :param processes: whose rewards mean and variance are taken over; default one alone
    """
    processes = processes or Processes()
    mean = processes.mean(rewards)
    whitened: np.ndarray = (rewards - mean) / np.sqrt(processes.variance(rewards) + 1e-8) + mean
    return whitened

"""What the agents that learn from their own rollouts share: environments, rollouts, statistics and saving.

An agent derives from :class:`TextOnPolicyAlgorithm` and from one of Stable-Baselines3's algorithms, and adds
a loss.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import numbers
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from transformers import PreTrainedModel

from textgym.agents.blueprint import LanguageModelBlueprint
from textgym.agents.distributed import Processes
from textgym.agents.episode_buffer import EpisodeBuffer
from textgym.agents.policy import LanguageModelPolicy, check_spaces
from textgym.agents.pretrained import (
    arguments_of,
    load_value_head,
    pickled_names,
    read_agent,
    stored_spaces,
    write_agent,
)
from textgym.envs import TextGenVectorEnv
from textgym.envs.options import check_number
from textgym.envs.sb3 import TextGenVecEnv, as_vec_env, deferrable
from textgym.language_model import LanguageModel, load_language_model
from textgym.lora import wants_lora
from textgym.rewards import RewardError

if TYPE_CHECKING:
    from typing_extensions import Self

TextEnv = str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv
EVALUATE_TOKENS = 16_384  # most padded tokens in one teacher-forced pass over a rollout; bounds memory, not results
SCORINGS = ("auto", "deferred", "instant")


class TrustWarning(UserWarning):
    """A file is opened that can run code."""


class TextEnvironment:
    """What an agent asks of the text environment at the bottom of a ``VecEnv``, whatever is wrapped around
    it.

    :param vec_env: around one :class:`TextGenVectorEnv`, or around N single environments
    """

    def __init__(self, vec_env: VecEnv) -> None:
        self.vec_env = vec_env
        bottom = vec_env.unwrapped
        self.rows: TextGenVectorEnv | None = bottom.text_env if isinstance(bottom, TextGenVecEnv) else None

    def _get(self, name: str) -> Any:
        if self.rows is not None:
            return getattr(self.rows, name)
        return self.vec_env.get_attr(name, indices=[0])[0]

    @property
    def temperature(self) -> float:
        return float(self._get("temperature"))

    @property
    def masking(self) -> bool:
        return bool(self._get("masking"))

    @property
    def kl_coef(self) -> float:
        return float(self._get("kl_coef"))

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        if self.rows is not None:
            self.rows.kl_coef = value
        else:  # set_attr would set it on the outermost wrapper of each
            self.vec_env.env_method("set_wrapper_attr", "kl_coef", value)

    def action_masks(self) -> np.ndarray:
        """``(N, V)`` bool, the tokens that the current states allow."""
        if self.rows is not None:
            return self.rows.action_masks()
        return np.stack(self.vec_env.env_method("action_masks"))

    def forget_cached(self) -> None:
        """Drop what the environment's models have cached."""
        if self.rows is not None:
            self.rows.forget_cached()
        else:
            self.vec_env.env_method("forget_cached")

    def report_log_probs(self, log_probs: np.ndarray) -> None:
        """:param log_probs: ``(N,)`` of the actions of the coming step, in nats."""
        log_probs = np.minimum(log_probs, 0.0)  # a sure token may come out at +1e-7
        if self.rows is not None:
            self.rows.report_log_probs(log_probs)
        else:
            for row, log_prob in enumerate(log_probs.tolist()):
                self.vec_env.env_method("report_log_prob", log_prob, indices=[row])

    def policy_language_model(self, device: torch.device) -> LanguageModel:
        """A trainable copy of the environment's language model."""
        if self.rows is not None:
            return self.rows.policy_language_model(device)
        model: LanguageModel = self.vec_env.env_method("policy_language_model", device, indices=[0])[0]
        return model

    def shared_language_model(self, device: torch.device) -> LanguageModel:
        """The environment's language model itself, for an adapter beside its weights; a copy from another process."""
        if self.rows is not None:
            return self.rows.reference_language_model()
        if isinstance(self.vec_env.unwrapped, DummyVecEnv):
            model: LanguageModel = self.vec_env.env_method("reference_language_model", indices=[0])[0]
            return model
        return self.policy_language_model(device)


class TextOnPolicyAlgorithm(OnPolicyAlgorithm):
    """Rollouts in text environments for Stable-Baselines3's on-policy algorithms.

    A class ``Agent(TextOnPolicyAlgorithm, SB3Algorithm)`` passes its environment through
    :meth:`make_vec_env`, sets the attributes below before ``_setup_model``, and uses :class:`EpisodeBuffer`
    as its rollout buffer.

    - ``scoring``: ``"deferred"`` scores a whole rollout at its end, in a few teacher-forced passes;
      ``"instant"`` every token at once; ``"auto"`` defers where nothing between environment and agent looks
      at the rewards. Both give the same rewards, but while it is deferred callbacks see zeros during the
      rollout
    - ``whiten_rewards``: divide the rewards of a rollout by their standard deviation (biased), keeping their
      mean
    - ``finished_episodes``: the episodes that ended in the last rollout, each with ``r`` (return), ``l``
      (tokens), ``kl`` (nats), ``score``, ``finish_reason``, ``prompt`` and ``completion``
    - ``importance_cap``: where tokens were drawn with a copy of the weights (``rollout_dtype``), each counts in
      the loss by the ratio of its probabilities under the weights and the copy, at most this (truncated importance
      sampling); None for no such weights
    - ``bootstrap_truncated``: add γ·V(last state) to the last reward where the token budget ran out, as SB3
      does
    - ``processes``: those that learn together (:mod:`textgym.agents.distributed`), in most cases one alone. Rows are
      each process's own; ``num_timesteps`` counts the tokens of all, and ``ep_info_buffer``, which ``rollout/*`` are
      means of, has everybody's episodes
    """

    policy: LanguageModelPolicy
    rollout_buffer: EpisodeBuffer
    scoring: str
    whiten_rewards: bool
    bootstrap_truncated: bool
    importance_cap: float | None
    processes: Processes
    finished_episodes: list[dict[str, Any]]
    _last_obs: Any

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
            environment = self._checked_environment(self.env)
            kwargs.setdefault("temperature", environment.temperature)
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
        self._row_kl = np.zeros(self.n_envs)  # KL of the running episodes, nats
        self._pending_log: dict[str, Any] = {}  # of a resumed run: what the last update before the stop recorded
        super()._setup_model()
        self._all_rows = int(self.processes.total(self.n_envs))
        self.processes.broadcast(p for p in self.policy.parameters() if p.requires_grad)
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
        self._checked_environment(vec_env)
        super().set_env(vec_env, force_reset)

    def _checked_environment(self, env: VecEnv) -> TextEnvironment:
        check_spaces(env.observation_space, env.action_space)
        environment = TextEnvironment(env)
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
        """
        deferred = None if self.scoring == "instant" else deferrable(env)
        if deferred is None:
            return self._collect(env, callback, rollout_buffer, n_rollout_steps, None)
        deferred.defer_scoring(True)
        try:
            return self._collect(env, callback, rollout_buffer, n_rollout_steps, deferred)
        except BaseException:
            # An interrupt must not leave behind an environment that pays zeros and can't be reset.
            with contextlib.suppress(RuntimeError, RewardError):
                deferred.score_deferred()
            raise
        finally:
            with contextlib.suppress(RuntimeError):  # raised where an error of the reward left steps unscored
                deferred.defer_scoring(False)

    def _collect(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: EpisodeBuffer,
        n_rollout_steps: int,
        deferred: TextGenVectorEnv | None,
    ) -> bool:
        """:meth:`collect_rollouts`, with scoring deferred in ``deferred`` if that is given."""
        assert self._last_episode_starts is not None
        environment = TextEnvironment(env)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        # Nothing cached reaches from one rollout into the next: a run resumed between two of them is the same run.
        environment.forget_cached()
        self.policy.forget_cached()
        self.finished_episodes = []
        bootstrap = np.zeros((n_rollout_steps, env.num_envs), dtype=np.float32)
        n_steps = 0
        callback.on_rollout_start()

        while n_steps < n_rollout_steps:
            masks = environment.action_masks() if environment.masking else None
            tokens, values, log_probs = self.policy(self._last_obs, action_masks=masks)
            actions = tokens.cpu().numpy()
            environment.report_log_probs(log_probs.cpu().numpy())
            new_obs, rewards, dones, infos = env.step(actions)

            self.num_timesteps += self._all_rows
            rollout_buffer.add(self._last_obs, actions, rewards, self._last_episode_starts, values, log_probs, masks)
            if self.bootstrap_truncated:
                bootstrap[n_steps] = self.gamma * self._values_where_truncated(dones, infos)
            if deferred is None:
                self._note_finished(self._episodes_in(infos, dones, self._last_episode_starts))
            # Before the callback, unlike SB3: a rollout that a callback stops can be gone on from.
            self._last_obs, self._last_episode_starts = new_obs, dones

            callback.update_locals(locals())
            if not callback.on_step():
                if deferred is not None:
                    self._note_finished(deferred.score_deferred().episodes)
                return False
            n_steps += 1

        acted_with_copy = self.policy.rollout_dtype is not None
        if acted_with_copy:
            self._evaluate_anew(rollout_buffer)
        if deferred is not None:
            scores = deferred.score_deferred(rollout_buffer.log_probs if acted_with_copy else None)
            rollout_buffer.rewards[:] = scores.rewards[-n_rollout_steps:]
            self._note_finished(scores.episodes)
        if self.whiten_rewards:
            rollout_buffer.rewards = whitened(rollout_buffer.rewards, self.processes)
        # V is on the scale of whitened rewards, so it is added after whitening.
        rollout_buffer.rewards += bootstrap
        last_values = (self.policy.forced_values if acted_with_copy else self.policy.predict_values)(self._last_obs)
        rollout_buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)
        if self.processes.world_size > 1:
            self._remember(self.processes.interleaved(_figures_of(self.finished_episodes)))

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _values_where_truncated(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """``(N,)`` V of the last observation of episodes whose budget ran out, 0 elsewhere (SB3 issue
        #633)."""
        values = np.zeros(len(dones), dtype=np.float32)
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool)
        rows = np.flatnonzero(dones & truncated)
        if len(rows):
            last = [infos[row]["terminal_observation"] for row in rows]
            obs = {name: np.stack([o[name] for o in last]) for name in last[0]}
            exact = self.policy.rollout_dtype is not None
            last_values = self.policy.forced_values(obs) if exact else self.policy.predict_values(obs, rows)
            values[rows] = last_values.flatten().cpu().numpy()
        return values

    @torch.no_grad()
    def _evaluate_anew(self, buffer: EpisodeBuffer) -> None:
        """Put the trained weights' log-probabilities and values in the place of those of the copy that acted."""
        drawn_with = buffer.log_probs.copy()
        segments = sorted(buffer.segments, key=lambda segment: -segment.length)
        start = 0
        while start < len(segments):
            part = segments[start : start + max(1, EVALUATE_TOKENS // segments[start].length)]
            start += len(part)
            values, log_prob, _ = self.policy.evaluate_segments(buffer.samples(part))
            at = buffer.places(part)
            buffer.values[at] = values.flatten().cpu().numpy()
            buffer.log_probs[at] = np.minimum(log_prob.cpu().numpy(), 0.0)  # a sure token may come out at +1e-7
        log_ratio = buffer.log_probs - drawn_with
        if self.importance_cap is not None:
            buffer.importance = np.minimum(np.exp(log_ratio), self.importance_cap)
        self.logger.record("rollout/log_ratio_abs", self.processes.mean(np.abs(log_ratio)))
        self.logger.record("rollout/log_ratio_max", self.processes.largest(np.abs(log_ratio).max()))

    # Statistics

    def _episodes_in(
        self, infos: list[dict[str, Any]], dones: np.ndarray, episode_starts: np.ndarray
    ) -> list[dict[str, Any]]:
        """The episodes that ended with this step, from instantly scored infos."""
        self._row_kl[episode_starts] = 0.0
        self._row_kl += [info.get("kl", np.nan) for info in infos]
        names = ("score", "finish_reason", "prompt", "completion")
        return [
            {
                **infos[row].get("episode", {}),
                **{name: infos[row][name] for name in names if name in infos[row]},
                "kl": float(self._row_kl[row]),
                "row": int(row),
            }
            for row in np.flatnonzero(dones)
        ]

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
        assert self.env is not None
        self.logger.record("train/kl_coef", TextEnvironment(self.env).kl_coef)
        super().dump_logs(iteration)

    # Saving

    def _excluded_save_params(self) -> list[str]:
        own = ["finished_episodes", "_row_kl", "_pending_log", "processes", "_all_rows"]
        return [*super()._excluded_save_params(), *own]

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: TextEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load what ``save`` wrote. The file holds pickles: opening it runs whatever code they name.

        An agent from somebody else is opened by :meth:`from_pretrained`, which reads data only.

        :param path: the zip file
        :param env: to go on learning in
        :param device: where the networks go
        :param custom_objects: attributes to use instead of the stored ones; those aren't unpickled
        :param print_system_info: whether to print on what system the agent was saved
        :param force_reset: whether to begin new episodes before learning on
        :param trust: whether you trust who made the file. True: load. False: refuse a file with pickles. None: load,
            with a warning that names what is unpickled
        :param kwargs: attributes to change
        :raises ValueError: with ``trust=False``, if loading would run code
        """
        if trust is not True:
            names = [name for name in pickled_names(path) if name not in (custom_objects or {})]
            message = (
                f"{path} holds pickles ({', '.join(names)}), and opening a pickle runs the code that it names. "
                "Load files only from people you trust; from_pretrained opens what save_pretrained wrote, without that"
            )
            if names and trust is False:
                raise ValueError(message)
            if names:
                warnings.warn(f"{message}. trust=True says that you do", TrustWarning, stacklevel=2)
        vec_env = None if env is None else as_vec_env(env)
        return super().load(path, vec_env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save_pretrained(self, directory: str | pathlib.Path) -> None:
        """Write the agent as files without code: a Hugging Face checkpoint, the value head and the configuration.

        ``AutoModelForCausalLM``, ``AutoTokenizer`` and textgym's ``language_model=`` open the directory as the trained
        language model, :meth:`from_pretrained` as the agent. To go on with a training exactly, with the state of the
        optimizer and of every episode, see :mod:`textgym.agents.checkpoints`.

        An adapter is merged into the weights that are written, and stands by itself in ``adapter`` besides.

        :param directory: made if it does not exist
        :raises NotADirectoryError: if it is a file
        """
        directory = pathlib.Path(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"directory={str(directory)!r} is a file; a checkpoint is a directory")
        self.policy.language_model.save_pretrained(directory)
        write_agent(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | pathlib.Path,
        env: TextEnv | None = None,
        *,
        device: torch.device | str = "auto",
        **arguments: Any,
    ) -> Self:
        """Open an agent that :meth:`save_pretrained` wrote; no code in the directory is run.

        The optimizer begins anew. Of an agent with an adapter the merged weights are opened, and all of them learn;
        pass ``policy_kwargs={"lora": ...}`` for a new adapter beside them.

        :param directory: what was written
        :param env: to learn in; without one the agent predicts and generates
        :param device: where the networks go
        :param arguments: constructor arguments to use instead of the stored ones
        :raises FileNotFoundError: if the directory holds no agent
        :raises ValueError: if it holds another one, or one of its arguments was a function and isn't given
        """
        directory = pathlib.Path(directory)
        configuration = read_agent(directory, cls.__name__)
        language_model = load_language_model(str(directory), device=device, dtype=configuration["dtype"])
        policy_kwargs = {
            **configuration["policy"],
            **arguments.pop("policy_kwargs", {}),
            "language_model": language_model.trainable_copy(),
        }
        model = cls(
            "LanguageModelPolicy",
            None if env is None else as_vec_env(env),  # type: ignore[arg-type]
            policy_kwargs=policy_kwargs,
            device=device,
            _init_setup_model=env is not None,
            **arguments_of(configuration, arguments),
        )
        if env is None:
            model.observation_space, model.action_space = stored_spaces(configuration)
            model.n_envs = 1
            model._setup_model()
        load_value_head(model, directory)
        model.num_timesteps = configuration["num_timesteps"]
        return model


def _figures_of(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``rollout/*`` are made of; without the texts, because they are saved with the agent."""
    names = ("r", "l", "score", "kl", "finish_reason")
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


def check_count(name: str, value: Any) -> None:
    """:raises ValueError: unless ``value`` is a whole number of at least 1"""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def check_schedule(name: str, value: Any, open_low: bool = False) -> None:
    """Check a hyperparameter that may be a number or a function of the remaining progress.

    :raises ValueError: if it is a number that is negative, not finite, or 0 with ``open_low``
    """
    if not callable(value):
        check_number(name, value, low=0.0, open_low=open_low)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """:raises ValueError: unless ``value`` is one of the choices"""
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(repr(c) for c in choices)}")

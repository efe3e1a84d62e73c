"""A rollout: how its steps are taken, and what happens at its end.

A reader can follow it downwards: it begins, takes its steps (each is drawn, taken and put into the buffer), and ends,
which puts what the steps earned, and what agents learn from it, into the buffer. The rollout loop is here and nowhere
else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.common.episode_figures import logged_figures
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.finite import check_rollout
from textgym.agents.common.normalisation import whiten_rewards
from textgym.agents.common.rollout_log_probs import evaluate_anew, reference_log_probs
from textgym.agents.common.text_agent import TextAgent
from textgym.agents.common.text_environment import TextEnvironment
from textgym.divergence import DivergedError
from textgym.replies import ReplyError
from textgym.rewards import RewardError


@dataclasses.dataclass
class _TakenSteps:
    """The steps of a rollout that are in the buffer, and what a rollout whose reward or reply failed goes on from.

    :param timesteps: tokens trained on before them
    :param bootstrap: ``(T, N)`` what is added to their rewards
    :param steps: of each row
    :param counted: tokens trained on, these included
    :param drawn: actions, values and log-probabilities of the step that failed; None where it was not a step's
    :param observation: in which they were drawn
    """

    timesteps: int
    bootstrap: np.ndarray
    steps: int = 0
    counted: int = 0
    drawn: tuple[Any, Tensor, Tensor] | None = None
    observation: Any = None


class CollectingAgent(TextAgent):
    """An agent that collects rollouts.

    What an agent may do in another way: :meth:`begin_rollout`, :meth:`action_masks`, :meth:`draw`,
    :attr:`needs_reference` and :meth:`compute_advantages`.

    - ``finished_episodes``: the episodes that ended in the last rollout
    """

    finished_episodes: list[dict[str, Any]]
    exploration: Exploration | None
    importance_cap: float | None
    whiten_rewards: bool
    bootstrap_truncated: bool

    def _setup_model(self) -> None:
        self.finished_episodes = []
        self._unscored: _TakenSteps | None = None  # of a rollout whose reward failed
        super()._setup_model()
        self._all_rows = int(self.processes.total(self.n_envs))

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
        :raises ReplyError: if the reply fails; likewise
        """
        environment = self._environment
        taken, self._unscored = self._unscored, None
        if taken is not None and not self._goes_on(taken, environment):
            taken = None
        if taken is None:
            environment.begin_rollout(self.scoring, np.asarray(self._last_episode_starts, dtype=bool))
        try:
            if taken is None:
                taken = self._begun_rollout(environment, callback, rollout_buffer)
            else:
                self.num_timesteps = taken.counted
            whole = self._take_steps(taken, environment, callback, rollout_buffer, n_rollout_steps)
            if whole:
                self._finish_rollout(taken, environment, rollout_buffer)
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

    # It begins

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
        if self.exploration is not None:
            mixture = self.exploration.at(self._current_progress_remaining)
            self.logger.record("rollout/exploration_temperature", mixture.temperature)
            self.logger.record("rollout/exploration_reference_share", mixture.reference_share)
        self.begin_rollout(environment)
        return taken

    def begin_rollout(self, environment: TextEnvironment) -> None:
        """Before the first step of a rollout; the rows go on where they are."""

    # It takes its steps

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

    def action_masks(self, environment: TextEnvironment) -> np.ndarray | None:
        """``(N, V)`` bool, the tokens that may be drawn in the current states; None where all may."""
        return environment.action_masks() if environment.masking else None

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

    def draw(self, obs: Any, masks: np.ndarray | None, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The next tokens ``(B,)``, with values ``(B, 1)`` and log-probabilities ``(B,)``; here the policy's.

        :param obs: observations of B rows
        :param masks: ``(B, V)`` bool, from :meth:`action_masks`
        :param rows: ``(B,)`` which rows they are; default 0 to B-1
        """
        if self.exploration is None:
            return self.policy(obs, action_masks=masks, rows=rows)
        return self._explore(self.exploration, obs, masks, np.arange(len(obs["input_ids"])) if rows is None else rows)

    def _explore(
        self, exploration: Exploration, obs: Any, masks: np.ndarray | None, rows: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`draw`, from other than the policy's own distribution; the buffer notes from what."""
        mixture = exploration.at(self._current_progress_remaining)
        reference = None
        if mixture.reference_share > 0:
            model = self._environment.shared_language_model(self.device)
            reference = self.policy.next_token_log_probs(model, obs, masks, rows)
        drawn_from: list[Tensor] = []

        def behaviour(log_probs: Tensor) -> Tensor:
            drawn_from.append(mixture.log_probs(log_probs, reference))
            return drawn_from[0]

        tokens, values, log_probs = self.policy(obs, action_masks=masks, rows=rows, behaviour=behaviour)
        chosen = drawn_from[0].gather(1, tokens[:, None]).squeeze(1)
        self.rollout_buffer.note_drawn_with(rows, chosen.float().cpu().numpy())
        return tokens, values, log_probs

    def _keep(self, taken: _TakenSteps, environment: TextEnvironment, error: BaseException) -> None:
        """After an error of a step, or of its scores: let the next rollout go on with it, or begin anew."""
        if environment.rows is None:
            self._last_obs = None  # of single environments some have taken the step
        elif isinstance(error, RewardError | ReplyError):
            taken.counted, taken.observation = self.num_timesteps, self._last_obs
            self._unscored = taken
        if isinstance(error, RewardError | ReplyError):
            self.num_timesteps = taken.timesteps  # tokens count once they are scored

    def _count_of_all(self, active: np.ndarray) -> int:
        """About how many tokens all processes wrote in this step; the sum at the end of the rollout is exact."""
        return round(int(active.sum()) * self._all_rows / len(active))

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

    # It ends

    def _finish_rollout(self, taken: _TakenSteps, environment: TextEnvironment, rollout_buffer: EpisodeBuffer) -> None:
        """Put what the steps earned, and what agents learn from it, into the buffer."""
        self.num_timesteps = taken.timesteps + int(self.processes.total(rollout_buffer.taken))
        acted_with_copy = self.policy.rollout_dtype is not None
        if acted_with_copy:
            evaluate_anew(self.policy, rollout_buffer)
        if rollout_buffer.drawn_with is not None:
            log_ratio = np.abs(rollout_buffer.weigh(self.importance_cap))
            self.logger.record("rollout/log_ratio_abs", self.processes.mean(log_ratio))
            self.logger.record("rollout/log_ratio_max", self.processes.largest(log_ratio.max()))
        new = slice(rollout_buffer.held_steps, rollout_buffer.pos)
        try:
            scores = environment.scores(rollout_buffer.log_probs[new] if acted_with_copy else None)
        except RewardError as error:
            self._keep(taken, environment, error)
            raise
        earlier = len(scores.rewards) - taken.steps  # steps of a rollout before, whose reward had failed
        rollout_buffer.rewards[new] = scores.rewards[earlier:]
        rollout_buffer.kl[new] = scores.kl[earlier:]
        rollout_buffer.note_turn_ends(scores.turn_ends[earlier:])
        self._note_finished([{**e, "step": e["step"] - earlier + new.start} for e in scores.episodes])
        if self.whole_episodes:
            rollout_buffer.hold(~np.asarray(self._last_episode_starts, dtype=bool))
        if self.needs_reference:
            reference = environment.shared_language_model(self.device)
            known = scores.ref_log_prob[earlier:]
            rollout_buffer.ref_log_probs = reference_log_probs(self.policy, rollout_buffer, reference, known)
        check_rollout(rollout_buffer, ("log_probs", "values", "rewards"), self.num_timesteps)
        if self.whiten_rewards:
            whiten_rewards(rollout_buffer, self.processes)
        # V is on the scale of whitened rewards, so it is added after whitening.
        rollout_buffer.rewards += taken.bootstrap
        with np.errstate(over="ignore", invalid="ignore"):  # the check says what came of it
            self.compute_advantages(rollout_buffer, self._last_values())
        check_rollout(rollout_buffer, ("advantages", "returns"), self.num_timesteps)
        if self.processes.world_size > 1:
            self._remember(self.processes.interleaved(logged_figures(self.finished_episodes)))

    @property
    def needs_reference(self) -> bool:
        """Whether minibatches are to have the reference model's log-probabilities."""
        return False

    def _note_finished(self, episodes: list[dict[str, Any]]) -> None:
        self.finished_episodes.extend(episodes)
        if self.processes.world_size == 1:  # else with the others' episodes, at the end of the rollout
            self._remember(logged_figures(episodes))

    def _remember(self, figures: list[dict[str, Any]]) -> None:
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.extend(figures)

    def _last_values(self) -> Tensor:
        """``(N, 1)`` V of the texts that go on after the rollout; 0 where another begins, which no step leads to.

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

    def _values_of(self, obs: dict[str, np.ndarray], rows: np.ndarray) -> Tensor:
        """``(B, 1)`` V of the trained weights for observations of some rows."""
        exact = self.policy.rollout_dtype is not None  # else what acts, and has cached most of it, are the weights
        return self.policy.forced_values(obs) if exact else self.policy.predict_values(obs, rows)

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """Fill the buffer's ``advantages`` and ``returns``; here with generalised advantage estimates.

        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".

        :param buffer: with rewards, values and ``episode_starts``
        :param last_values: ``(N, 1)`` V of the states after the last step
        """
        assert self._last_episode_starts is not None
        buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "finished_episodes", "_unscored", "_all_rows"]

"""A rollout buffer for text: it keeps token segments instead of observations, and yields whole segments.

In text generation an observation is the one before plus the action, and after a turn plus what others said to it. A
*segment* is a maximal run of steps of one row in which that holds, within one episode; one teacher-forced forward over
a segment gives the log-prob, the entropy and the value of all its transitions, however many turns it has. So the buffer
stores where each segment begins, the tokens it begins with and those that others put in, and nothing else of the
observations; rewards, values, advantages and returns are Stable-Baselines3's own arrays, ``(T, N)`` for T steps of N
rows, and so is the computation of advantages.

An agent that learns from whole episodes only *holds* those that still run at the end of a rollout: their steps are
then not among the segments, and come first, before T new steps, in the next rollout, which ends them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from torch import Tensor

from textgym.envs.segments import Segment

# Per step: what there is of a held episode. Advantages, returns and importance are computed when it has ended.
_HELD = (
    "active",
    "actions",
    "rewards",
    "episode_starts",
    "values",
    "log_probs",
    "packed_masks",
    "drawn_with",
    "kl",
    "turn_ends",
    "episodes",
)


class SegmentSamples(NamedTuple):
    """A minibatch of B segments with M transitions in all, flat in SB3's fields.

    ``rows`` and ``positions`` say which hidden state of ``input_ids`` a transition's action is predicted
    from.
    """

    input_ids: np.ndarray  # (B, L) prefix and actions, right-padded
    lengths: np.ndarray  # (B,) how many of these are real
    rows: np.ndarray  # (M,)
    positions: np.ndarray  # (M,)
    actions: Tensor  # (M,)
    old_values: Tensor  # (M,)
    old_log_prob: Tensor  # (M,)
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,)
    action_masks: Tensor | None  # (M, V) bool
    importance: Tensor | None  # (M,) weights of tokens that were drawn from other than the old probabilities
    ref_log_prob: Tensor | None  # (M,) of the reference model, where the agent asked for it
    episodes: np.ndarray  # (B,) numbers of the segments' episodes in a round, -1 without one
    prompt_lengths: np.ndarray  # (B,) how many of the tokens are the prompt
    rewards: Tensor  # (M,)
    turns: np.ndarray | None  # (M,) which turn of its segment each belongs to, from 0; None where it isn't known


class EpisodeBuffer(RolloutBuffer):
    """SB3's :class:`RolloutBuffer` over token segments.

    - ``held_steps``: H, how many steps at the beginning of the arrays, ``(H + T, N)``, were taken in earlier rollouts
    - ``active``: where a step is to be learned from; elsewhere a row waited, or the step is another rollout's

    :param buffer_size: steps per row and rollout, T
    :param observation_space: the environment's ``Dict(input_ids, attention_mask, ...)``
    :param action_space: ``Discrete(V)``
    :param device: where minibatches are put
    :param gae_lambda: λ of generalised advantage estimation
    :param gamma: discount per token
    :param n_envs: number of rows, N
    """

    observation_space: spaces.Dict
    action_space: spaces.Discrete

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        device: torch.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
    ) -> None:
        self.context = int(observation_space["input_ids"].shape[0])  # type: ignore[index]
        self.rollout_steps = buffer_size
        self._held: dict[str, Any] = {}
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Empty the buffer, but for the episodes on :meth:`hold`, whose steps come first in it again."""
        held = self._held
        self.held_steps = len(held["active"]) if held else 0
        self.buffer_size = self.held_steps + self.rollout_steps
        shape = (self.buffer_size, self.n_envs)
        self.actions = np.zeros((*shape, 1), dtype=np.int64)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.returns = np.zeros(shape, dtype=np.float32)
        self.episode_starts = np.zeros(shape, dtype=np.float32)
        self.values = np.zeros(shape, dtype=np.float32)
        self.log_probs = np.zeros(shape, dtype=np.float32)
        self.advantages = np.zeros(shape, dtype=np.float32)
        self.packed_masks: np.ndarray | None = None  # (T, N, V / 8) uint8
        # (T, N) log-probs that actions were drawn with, if not log_probs; NaN where they are
        self.drawn_with: np.ndarray | None = None
        self.importance: np.ndarray | None = None  # (T, N)
        self.ref_log_probs: np.ndarray | None = None  # (T, N)
        self.kl = np.full(shape, np.nan, dtype=np.float32)  # whose penalty the rewards have in them, nats
        self.turn_ends: np.ndarray | None = None  # (T, N) bool, which steps ended a turn
        self.active = np.zeros(shape, dtype=bool)
        self.episodes = np.full(shape, -1, dtype=np.int64)  # numbers of the episodes in a round
        self._prefixes: dict[tuple[int, int], np.ndarray] = {}  # (row, step) a segment begins at: its prefix
        self._prompt_lengths: dict[tuple[int, int], int] = {}  # and how many of these tokens are the prompt
        self._said: dict[tuple[int, int], np.ndarray] = {}  # (row, step): what others said right before that step
        self._expected = np.zeros((self.n_envs, self.context), dtype=np.int64)  # last observation plus action
        self._expected_lengths = np.zeros(self.n_envs, dtype=np.int64)
        self.pos = self.held_steps
        self.full = False
        if held:
            self._go_on(held)

    def _go_on(self, held: dict[str, Any]) -> None:
        """Put in the steps that were held."""
        if "packed_masks" in held:
            self.packed_masks = self._no_masks()
        if "drawn_with" in held:
            self.drawn_with = self._drawn_as_noted()
        if "turn_ends" in held:
            self.turn_ends = np.zeros(self.rewards.shape, dtype=bool)
        for name in _HELD:
            if name in held:
                getattr(self, name)[: self.held_steps] = held[name]
        for row, step, prompt_length, prefix in held["segments"]:
            self._prefixes[row, step] = prefix
            if prompt_length is not None:
                self._prompt_lengths[row, step] = prompt_length
        self._said = {(row, step): ids for row, step, ids in held["said"]}
        self._expected, self._expected_lengths = held["expected"].copy(), held["expected_lengths"].copy()

    def hold(self, running: np.ndarray) -> None:
        """Take the episodes that go on after the last step out of what is learned from, and keep them for the next
        rollout. To be called with rewards, values and log-probabilities in the buffer.

        :param running: ``(N,)`` bool, the rows whose episode goes on
        """
        begun = np.full(self.n_envs, self.pos)  # (N,) where the running episodes begin in the buffer
        for row in np.flatnonzero(running).tolist():
            segments = [step for of, step in self._prefixes if of == row]
            starts = [step for step in segments if self.episode_starts[step, row]]
            begun[row] = max(starts, default=min(segments, default=self.pos))
        first = int(begun.min())
        if first == self.pos:
            return
        held = {name: getattr(self, name)[first : self.pos] for name in _HELD if getattr(self, name) is not None}
        kept = np.arange(first, self.pos)[:, None] >= begun  # (H, N)
        self._held = {name: array.copy() for name, array in held.items()}
        self._held["active"] = self.active[first : self.pos] & kept
        self.active[first : self.pos] &= ~kept
        taken = sorted((row, step) for row, step in self._prefixes if step >= begun[row])
        self._held["segments"] = [
            (row, step - first, self._prompt_lengths.pop((row, step), None), self._prefixes.pop((row, step)))
            for row, step in taken
        ]
        said = sorted(key for key in self._said if key[1] >= begun[key[0]])
        self._held["said"] = [(row, step - first, self._said.pop((row, step))) for row, step in said]
        self._held["expected"], self._held["expected_lengths"] = self._expected, self._expected_lengths

    def state_dict(self) -> dict[str, Any]:
        """What is on :meth:`hold`, until the next rollout's first step, as arrays and plain data for a checkpoint."""
        return dict(self._held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._held = dict(state)

    def _no_masks(self) -> np.ndarray:
        return np.zeros((self.buffer_size, self.n_envs, (int(self.action_space.n) + 7) // 8), dtype=np.uint8)

    def _drawn_as_noted(self) -> np.ndarray:
        return np.full((self.buffer_size, self.n_envs), np.nan, dtype=np.float32)

    def note_drawn_with(self, rows: np.ndarray, log_probs: np.ndarray) -> None:
        """The next step's actions are drawn from other than the policy's distribution.

        :param rows: ``(B,)``
        :param log_probs: ``(B,)`` of these rows' actions in that distribution
        """
        if self.drawn_with is None:
            self.drawn_with = self._drawn_as_noted()
        self.drawn_with[self.pos, rows] = log_probs

    def fix_drawn_with(self) -> np.ndarray:
        """``(T, N)`` what actions were drawn with: by now the log-probabilities, where nothing else was noted."""
        if self.drawn_with is None:
            self.drawn_with = self._drawn_as_noted()
        self.drawn_with = np.where(np.isnan(self.drawn_with), self.log_probs, self.drawn_with)
        return self.drawn_with

    def weigh(self, importance_cap: float | None) -> np.ndarray:
        """Weigh actions by their probability under the policy over that in what they were drawn from.

        :param importance_cap: the largest weight; None for no weights
        :return: ``(T, N)`` logarithms of these ratios, nats, before the cap
        """
        log_ratio = np.where(self.active, self.log_probs - self.fix_drawn_with(), 0.0).astype(np.float32)
        if importance_cap is not None:
            self.importance = np.minimum(np.exp(log_ratio), importance_cap)
        return log_ratio

    def add(  # type: ignore[override]
        self,
        obs: Mapping[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
        action_masks: np.ndarray | None = None,
        episodes: np.ndarray | None = None,
    ) -> None:
        """Add one step of all rows.

        :param obs: the environment's observation, ``(N, L)`` arrays
        :param action: ``(N,)`` or ``(N, 1)`` tokens
        :param reward: ``(N,)``
        :param episode_start: ``(N,)`` whether an episode begins with this observation
        :param value: ``(N,)`` or ``(N, 1)`` V of the observation
        :param log_prob: ``(N,)`` of the actions
        :param action_masks: ``(N, V)`` bool, the tokens that were allowed; given always or never
        :param episodes: ``(N,)`` numbers of the rows' episodes in a round, -1 where a row waits; None without a round
        """
        step, rows = self.pos, np.arange(self.n_envs)
        tokens = np.asarray(action, dtype=np.int64).reshape(self.n_envs)
        ids = np.asarray(obs["input_ids"], dtype=np.int64)
        lengths = np.asarray(obs["attention_mask"]).sum(1, dtype=np.int64)  # (N,)

        inside = np.arange(self.context) < self._expected_lengths[:, None]
        grown = (lengths >= self._expected_lengths) & ((ids == self._expected) | ~inside).all(1)
        active = np.ones(self.n_envs, dtype=bool) if episodes is None else episodes >= 0
        begins = ~grown | np.asarray(episode_start, dtype=bool)
        if step == self.held_steps:
            self._held = {}
            self._drop_held(begins)
            begins |= ~self.active[:step].any(0)
        for row in np.flatnonzero(begins & active):
            self._prefixes[int(row), step] = ids[row, : lengths[row]].copy()
            if "prompt_length" in obs:
                self._prompt_lengths[int(row), step] = int(np.asarray(obs["prompt_length"])[row].item())
        for spoken in np.flatnonzero(~begins & active & (lengths > self._expected_lengths)).tolist():
            self._said[spoken, step] = ids[spoken, self._expected_lengths[spoken] : lengths[spoken]].copy()
        self._expected[:] = ids
        # A row without room for the token can't go on: its next observation is shorter.
        self._expected[rows, np.minimum(lengths, self.context - 1)] = tokens
        self._expected_lengths = lengths + 1

        if action_masks is not None:
            if self.packed_masks is None:
                self.packed_masks = self._no_masks()
            self.packed_masks[step] = np.packbits(action_masks, axis=1)
        self.active[step] = active
        if episodes is not None:
            self.episodes[step] = episodes
        self.actions[step] = tokens[:, None]
        self.rewards[step] = reward
        self.episode_starts[step] = episode_start
        self.values[step] = value.detach().cpu().numpy().reshape(self.n_envs)
        self.log_probs[step] = log_prob.detach().cpu().numpy().reshape(self.n_envs)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def _drop_held(self, rows: np.ndarray) -> None:
        """Give up held episodes that never go on, because the environment was reset.

        :param rows: ``(N,)`` bool
        """
        self.active[: self.held_steps, rows] = False
        for row, step in [key for key in self._prefixes if rows[key[0]]]:
            del self._prefixes[row, step]
            self._prompt_lengths.pop((row, step), None)
        self._said = {key: ids for key, ids in self._said.items() if not rows[key[0]]}

    def finish(self) -> None:
        """The rollout is complete, with fewer steps than there is room for: every row waits."""
        self.episode_starts[self.pos :] = 1.0  # nothing flows back from beyond the end
        self.full = True

    @property
    def taken(self) -> int:
        """Steps of all rows in this rollout, without those at which a row waited; before :meth:`hold`."""
        return int(self.active[self.held_steps :].sum())

    @property
    def segments(self) -> list[Segment]:
        """All segments of what has been added, by row and then by time; together they are every active transition
        once."""
        starts = sorted(self._prefixes)
        segments = []
        for i, (row, start) in enumerate(starts):
            last = i + 1 == len(starts) or starts[i + 1][0] != row
            end = self.pos if last else starts[i + 1][1]
            steps = int(self.active[start:end, row].sum())  # a row waits, or is held, after its last episode only
            number = int(self.episodes[start, row])
            prefix = self._prefixes[row, start]
            ids, positions = self._text(row, start, steps)
            segments.append(
                Segment(
                    row=row,
                    start=start,
                    ids=ids,
                    positions=positions,
                    prompt_length=self._prompt_lengths.get((row, start), len(prefix)),
                    episode=number,
                )
            )
        return segments

    def _text(self, row: int, start: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The token ids ``(L,)`` of a segment's text, and where in it its actions stand, ``(S,)``."""
        prefix, actions = self._prefixes[row, start], self.actions[start : start + steps, row, 0]
        said = (
            sorted(key for key in self._said if key[0] == row and start < key[1] < start + steps) if self._said else []
        )
        pieces, shift, done = [prefix], np.zeros(steps, dtype=np.int64), 0
        for _, step in said:
            pieces += [actions[done : step - start], self._said[row, step]]
            done = step - start
            shift[done:] += len(self._said[row, step])
        return np.concatenate([*pieces, actions[done:]]), len(prefix) + np.arange(steps) + shift

    def get(  # type: ignore[override]
        self, batch_size: float | None = None, units: list[list[Segment]] | None = None
    ) -> Generator[SegmentSamples, None, None]:
        """Minibatches of whole segments in random order.

        The number of minibatches is that of ``batch_size`` transitions each, rounded; they are cut where each
        comes as near to an equal share as whole segments allow, and every transition is in exactly one.

        :param batch_size: wished transitions per minibatch; None for all at once
        :param units: segments that stay together, in this order; default each of :attr:`segments` by itself
        """
        if not self.full:
            raise ValueError(f"the rollout is not complete: it has {self.pos} of {self.buffer_size} steps")
        units = [[segment] for segment in self.segments] if units is None else units
        order = np.random.permutation(len(units))  # noqa: NPY002 (the generator that SB3 seeds)
        sizes = np.array([sum(segment.steps for segment in units[i]) for i in order])
        batches = 1 if batch_size is None else max(1, round(float(sizes.sum()) / batch_size))
        for part in np.split(order, _even_cuts(sizes, batches)):
            yield self.samples([segment for i in part for segment in units[i]])

    def places(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Where the arrays ``(T, N)`` have the M transitions of some segments: steps and rows, ``(M,)`` each."""
        steps = np.concatenate([s.steps_in_rollout for s in segments])
        return steps, np.repeat([s.row for s in segments], [s.steps for s in segments])

    def note_turn_ends(self, turn_ends: np.ndarray) -> None:
        """Which of the newest steps, ``(S, N)`` bool, ended a turn."""
        if self.turn_ends is None:
            self.turn_ends = np.zeros(self.rewards.shape, dtype=bool)
        self.turn_ends[self.pos - len(turn_ends) : self.pos] = turn_ends

    def turns(self, segments: list[Segment]) -> np.ndarray | None:
        """``(M,)`` which turn of its segment each transition of some segments belongs to, from 0; None where it is
        not known."""
        if self.turn_ends is None:
            return None
        ends = [self.turn_ends[segment.steps_in_rollout, segment.row] for segment in segments]
        return np.concatenate([np.cumsum(end) - end for end in ends])

    def masks_at(self, steps: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """``(M, V)`` bool action masks of M transitions; None where every token was allowed."""
        if self.packed_masks is None:
            return None
        return np.unpackbits(self.packed_masks[steps, rows], axis=1, count=int(self.action_space.n)).astype(bool)

    def samples(self, segments: list[Segment], with_masks: bool = True) -> SegmentSamples:
        """One minibatch of the given segments.

        :param segments: B of :attr:`segments`
        :param with_masks: whether the action masks, where there are some, are unpacked
        """
        steps = np.array([s.steps for s in segments])
        at = self.places(segments)
        lengths = np.array([s.length for s in segments])
        ids = np.zeros((len(segments), int(lengths.max())), dtype=np.int64)
        for row, segment in enumerate(segments):
            ids[row, : segment.length] = segment.ids[: segment.length]

        masks = self.masks_at(*at) if with_masks else None
        return SegmentSamples(
            input_ids=ids,
            lengths=lengths,
            rows=np.repeat(np.arange(len(segments)), steps),
            positions=np.concatenate([s.positions for s in segments]) - 1,
            actions=self.to_torch(self.actions[at][:, 0]),
            old_values=self.to_torch(self.values[at]),
            old_log_prob=self.to_torch(self.log_probs[at]),
            advantages=self.to_torch(self.advantages[at]),
            returns=self.to_torch(self.returns[at]),
            action_masks=None if masks is None else self.to_torch(masks),
            importance=None if self.importance is None else self.to_torch(self.importance[at]),
            ref_log_prob=None if self.ref_log_probs is None else self.to_torch(self.ref_log_probs[at]),
            episodes=np.array([s.episode for s in segments]),
            prompt_lengths=np.array([s.prompt_length for s in segments]),
            rewards=self.to_torch(self.rewards[at]),
            turns=self.turns(segments),
        )

    def as_single_steps(self) -> DictRolloutBuffer:
        """The same rollout as SB3 stores it: every transition with its whole observation.

        :raises ValueError: if not every step is learned from, which SB3's buffer has no place for
        """
        if not self.active.all():
            raise ValueError(
                "the rollout is of whole episodes: at its ends rows waited, or steps are another rollout's"
            )
        buffer = DictRolloutBuffer(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            self.device,
            self.gae_lambda,
            self.gamma,
            self.n_envs,
        )
        for name in ("actions", "rewards", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(buffer, name, getattr(self, name).copy())
        for segment in self.segments:
            for step, length in zip(segment.steps_in_rollout, segment.positions, strict=True):
                at: Any = (step, segment.row)
                buffer.observations["input_ids"][at][:length] = segment.ids[:length]
                buffer.observations["attention_mask"][at][:length] = 1
                if "prompt_length" in buffer.observations:
                    buffer.observations["prompt_length"][at][:] = segment.prompt_length
        buffer.pos, buffer.full = self.pos, self.full
        return buffer


def _even_cuts(sizes: np.ndarray, parts: int) -> np.ndarray:
    """Where to cut a list of segments so that its parts have as nearly as possible the same number of
    transitions.

    :param sizes: ``(S,)`` transitions of each segment, in order
    :param parts: wished number of parts; at most S are made, and none is empty
    :return: ``(parts - 1,)`` increasing indices for ``np.split``
    """
    parts = min(parts, len(sizes))
    ends = np.cumsum(sizes)  # (S,) transitions up to and with each segment
    cuts: list[int] = []
    for part in range(1, parts):
        nearest = int(np.abs(ends - ends[-1] * part / parts).argmin()) + 1
        earliest, latest = (cuts[-1] if cuts else 0) + 1, len(sizes) - (parts - part)
        cuts.append(min(max(nearest, earliest), latest))
    return np.array(cuts, dtype=np.int64)

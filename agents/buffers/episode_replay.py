"""Episodes that an agent goes on learning from: their tokens, what these earned, the reference model's log-probs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.checks import check_int
from textgym.envs.segments import Segment


@dataclass(frozen=True)
class Episode:
    """One whole episode in which the policy wrote T tokens.

    :param ids: ``(L,)`` int64 token ids of the whole text
    :param positions: ``(T,)`` int64 places in it of the policy's tokens
    :param prompt_length: tokens of the prompt
    :param rewards: ``(T,)`` float32
    :param ref_log_probs: ``(T,)`` float32, nats, or None
    :param masks: ``(T, V / 8)`` uint8, the packed action masks, or None
    """

    ids: np.ndarray
    positions: np.ndarray
    prompt_length: int
    rewards: np.ndarray
    ref_log_probs: np.ndarray | None
    masks: np.ndarray | None


class EpisodeReplay:
    """The newest episodes, in as much memory as their tokens take: some 20 bytes each, with action masks V / 8 more.

    :param capacity: most episodes; the oldest make room
    :param observation_space: the environment's
    :param action_space: ``Discrete(V)``
    :param device: where minibatches are put
    """

    def __init__(
        self,
        capacity: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
    ) -> None:
        check_int("capacity", capacity, low=1)
        self.capacity = capacity
        self._spaces = (observation_space, action_space)
        self._device = device
        self._episodes: deque[Episode] = deque(maxlen=capacity)

    def __len__(self) -> int:
        """How many episodes there are."""
        return len(self._episodes)

    @property
    def transitions(self) -> int:
        """How many tokens these have."""
        return sum(len(episode.positions) for episode in self._episodes)

    def add(self, buffer: EpisodeBuffer, rewards: np.ndarray) -> None:
        """Take over the episodes of a rollout.

        :param buffer: of whole episodes
        :param rewards: ``(T, N)`` what is to be learned from, in the place of the buffer's own
        """
        for segment in sorted(buffer.segments, key=lambda segment: segment.episode):
            at = (segment.steps_in_rollout, segment.row)
            reference, masks = buffer.ref_log_probs, buffer.packed_masks
            episode = Episode(
                ids=segment.ids.copy(),
                positions=segment.positions.copy(),
                prompt_length=segment.prompt_length,
                rewards=rewards[at].astype(np.float32),
                ref_log_probs=None if reference is None else reference[at].astype(np.float32),
                masks=None if masks is None else masks[at].copy(),
            )
            self._episodes.append(episode)

    def sample(self, number: int) -> SegmentSamples:
        """A minibatch of different episodes, each as likely as every other.

        :param number: B; all there are, if there are no more
        :raises ValueError: if there are none
        """
        if not self._episodes:
            raise ValueError("the replay has no episodes yet: add a rollout first")
        chosen = np.random.permutation(len(self))[:number]  # noqa: NPY002 (the generator that SB3 seeds)
        return self._samples([self._episodes[i] for i in chosen])

    def _samples(self, episodes: list[Episode]) -> SegmentSamples:
        """One minibatch: a rollout in which each episode has a row of its own."""
        longest = max(len(episode.positions) for episode in episodes)
        buffer = EpisodeBuffer(longest, *self._spaces, self._device, n_envs=len(episodes))  # type: ignore[arg-type]
        segments = []
        if episodes[0].ref_log_probs is not None:
            buffer.ref_log_probs = np.zeros((longest, len(episodes)), dtype=np.float32)
        if episodes[0].masks is not None:
            buffer.packed_masks = np.zeros((longest, len(episodes), episodes[0].masks.shape[1]), dtype=np.uint8)
        for row, episode in enumerate(episodes):
            steps = len(episode.positions)
            segments.append(
                Segment(
                    row=row,
                    start=0,
                    ids=episode.ids,
                    positions=episode.positions,
                    prompt_length=episode.prompt_length,
                    episode=row,
                )
            )
            buffer.actions[:steps, row, 0] = episode.ids[episode.positions]
            buffer.rewards[:steps, row] = episode.rewards
            if buffer.ref_log_probs is not None:
                buffer.ref_log_probs[:steps, row] = episode.ref_log_probs
            if buffer.packed_masks is not None:
                buffer.packed_masks[:steps, row] = episode.masks
        return buffer.samples(segments)

    # For checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All episodes, oldest first, as few arrays."""
        episodes = list(self._episodes)
        if not episodes:
            return {"lengths": np.zeros((0, 3), dtype=np.int64)}
        lengths = [[len(e.ids), len(e.positions), e.prompt_length] for e in episodes]
        joined: dict[str, Any] = {"lengths": np.array(lengths)}
        for name in ("ids", "positions", "rewards", "ref_log_probs", "masks"):
            parts = [getattr(episode, name) for episode in episodes]
            joined[name] = None if parts[0] is None else np.concatenate(parts)
        return joined

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; of more than there is room for, the newest stay."""
        self._episodes.clear()
        text_end = end = 0
        for length, steps, prompt_length in np.asarray(state["lengths"]).tolist():
            text, tokens = slice(text_end, text_end + length), slice(end, end + steps)
            text_end, end = text.stop, tokens.stop
            reference, masks = state["ref_log_probs"], state["masks"]
            episode = Episode(
                ids=state["ids"][text],
                positions=state["positions"][tokens],
                prompt_length=prompt_length,
                rewards=state["rewards"][tokens],
                ref_log_probs=None if reference is None else reference[tokens],
                masks=None if masks is None else masks[tokens],
            )
            self._episodes.append(episode)

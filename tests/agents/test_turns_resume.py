"""Trainings that are stopped amid a conversation end as if they had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import tiny_vector_env

from textgym import agents
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.replies import Reply, ReplyError, ReplyResult

SAID = ("", " very good", " story", " a great movie")
# How each is made, where it is stopped, and where it ends, in tokens.
AGENTS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    "PPO": ("PPO", {"n_steps": 6, "n_epochs": 2, "batch_size": 24}, (24, 48), 96),
    "PPO, whole episodes": ("PPO", {"n_steps": 17, "n_epochs": 2, "whole_episodes": True}, (68,), 204),
    "RLOO, turns": ("RLOO", {"group_size": 2, "credit": "turn"}, (30,), 60),
    "SARSA": ("SARSA", {}, (30,), 60),
}


class Moody(Reply):
    """Speaks by chance, and pays what its mood in an episode is."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rng = np.random.default_rng(3)
        self.moods: dict[int, float] = {}
        self.fails_in = fails_at

    def begin(self, rows: np.ndarray) -> None:
        self.moods |= {row: float(self.rng.random()) for row in rows.tolist()}

    def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[ReplyResult]:
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in == 0:
                raise ConnectionError("busy")
        return [
            ReplyResult(SAID[self.rng.integers(4)], self.moods[row], done=bool(self.rng.random() < 0.2))
            for row in rows.tolist()
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "moods": dict(self.moods)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.moods = {int(row): mood for row, mood in state["moods"].items()}


def make(name: str, reply: Reply | None = None, **more: Any) -> Any:
    agent, arguments, _, _ = AGENTS[name]
    turns = {"max_turns": 4, "max_reply_tokens": 4, "reward_every": "turn"}
    # Turns have four tokens each, whatever is drawn.
    env = tiny_vector_env(4, reply=reply or Moody(), max_new_tokens=4, min_new_tokens=4, action_masking=True, **turns)
    arguments = {"seed": 0, "device": "cpu", "learning_rate": 1e-2, **arguments, **more}
    return getattr(agents, agent)("LanguageModelPolicy", env, **arguments)


def where(model: Any) -> set[str]:
    """What the rows of an agent's environment are amid of."""
    texts = model.env.text_env._episodes.texts
    return {
        "nothing" if not taken else "a turn" if tokens else "between turns"
        for taken, tokens in zip(texts.taken.tolist(), texts.turn_tokens.tolist(), strict=True)
    }


@pytest.mark.parametrize("name", AGENTS)
def test_a_training_resumed_amid_conversations_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    _, _, stops, end = AGENTS[name]
    whole = make(name).learn(end)
    stopped_in: set[str] = set()
    for stop in stops:
        folder = tmp_path / str(stop)
        make(name).learn(stop, callback=TrainingCheckpoints(folder, every=1))
        model, checkpoints = make(name), TrainingCheckpoints(folder, every=1)
        resume(model, folder, [checkpoints])
        assert 0 < model.num_timesteps < end
        stopped_in |= where(model)
        model.learn(end - model.num_timesteps, reset_num_timesteps=False, callback=checkpoints)
        assert model.num_timesteps == whole.num_timesteps
        for ours, theirs in zip(model.policy.parameters(), whole.policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    if name == "PPO":  # the rollouts of the others end with episodes
        assert stopped_in >= {"a turn", "between turns"}


@pytest.mark.parametrize(("name", "scoring"), [("PPO", "deferred"), ("PPO", "instant"), ("RLOO, turns", "deferred")])
def test_a_training_whose_reply_failed_goes_on_with_the_same_step(name: str, scoring: str) -> None:
    weights = []
    for reply in (Moody(), Moody(fails_at=3)):
        model = make(name, reply, scoring=scoring)
        if reply.fails_in is not None:
            with pytest.raises(ReplyError, match="reply 'Moody': raised ConnectionError: busy"):
                model.learn(60)
        model.learn(60 - model.num_timesteps, reset_num_timesteps=False)
        weights.append([model.num_timesteps, *model.policy.state_dict().values()])
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(one, other) for one, other in zip(weights[0][1:], weights[1][1:], strict=True))

"""An 8-bit optimizer from another package: its state is a quarter, and training with it can be resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_agents import tiny_ppo, tiny_vector_env

from textgym.agents import PPO
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which works on CPUs, too")


def agent() -> PPO:
    # Small weights stay in 32 bits by default; those of the tiny model are all small.
    policy = {"optimizer_class": bitsandbytes.optim.Adam8bit, "optimizer_kwargs": {"eps": 1e-5, "min_8bit_size": 1_024}}
    return tiny_ppo(tiny_vector_env(2), learning_rate=1e-3, policy_kwargs=policy)


def state_bytes(model: PPO) -> int:
    tensors = [t for state in model.policy.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_state_of_an_8_bit_optimizer_is_about_a_quarter() -> None:
    eight, plain = agent(), tiny_ppo(tiny_vector_env(2))
    for model in (eight, plain):
        model.learn(24)
    weights = sum(p.numel() for p in plain.policy.parameters())
    assert state_bytes(plain) == pytest.approx(8 * weights, rel=0.01)
    # Two bytes a weight, and the scale of each block of 256 and the table of the codes.
    assert state_bytes(eight) < 0.35 * state_bytes(plain)
    assert eight.logger.name_to_value["train/ratio_first"] < 1e-4  # nothing cached outlives its weights


def test_training_with_an_8_bit_optimizer_resumes_exactly(tmp_path: Path) -> None:
    def trained(on_from: str | None) -> PPO:
        model, callback = agent(), TrainingCheckpoints(tmp_path, every=48, keep=None)
        if on_from is not None:
            resume(model, tmp_path / on_from, callback)
        model.learn(96 - model.num_timesteps, callback=callback, reset_num_timesteps=on_from is None)
        return model

    whole, resumed = trained(None), trained("checkpoint-000000000048")
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)

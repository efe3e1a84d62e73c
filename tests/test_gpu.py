"""The same properties on a CUDA device, where there is one: `pytest -m gpu`."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym  # noqa: F401  registers TextGen-v0
from textgym.agents import PPO
from textgym.language_model import load_language_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_cached_logits_on_the_gpu_equal_the_cpu_forward() -> None:
    cpu, gpu = load_language_model(device="cpu"), load_language_model(device="cuda")
    ids = np.array([cpu.encode("the film is a warm and funny story")[:8]] * 3)
    lengths = np.array([3, 5, 8])
    cached = gpu.cached(16)
    for step in (1, 0):
        hidden = cached.last_hidden(ids, lengths - step)
        logits = gpu.head(hidden).cpu()
        for row, length in enumerate(lengths - step):
            with torch.no_grad():
                expected = cpu.model(input_ids=torch.as_tensor(ids[row : row + 1, :length])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=2e-2, rtol=1e-2)


def test_ppo_trains_on_the_gpu_and_starts_every_update_at_ratio_one() -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=8, max_new_tokens=8, device="cuda")
    model = PPO("LanguageModelPolicy", envs, n_steps=8, batch_size=32, device="cuda", seed=0)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(128)
    assert model.logger.name_to_value["train/ratio_first"] < 1e-3  # of the last update
    assert any(not torch.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))

"""TRPO: the largest step that stays within a KL bound. It needs ``pip install "textgym[contrib]"``.

An update costs dozens of passes over the rollout, so this is for comparisons on small models.

    python examples/train_trpo.py          # or with a budget of tokens: python examples/train_trpo.py 8192
"""

import sys

import gymnasium as gym

from textgym.agents import TRPO

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 2_048

envs = gym.make_vec("TextGen-v0", num_envs=8, max_new_tokens=16, kl_coef=0.05)
model = TRPO("LanguageModelPolicy", envs, n_steps=16, target_kl=0.01, seed=0)
model.learn(TOKENS)
figures = model.logger.name_to_value  # of the last update
print(f"the last step went {figures['train/kl_divergence_loss']:.4f} nats per token, of 0.01 allowed")
print(model.policy.generate(["the film is"], seed=0)[0])

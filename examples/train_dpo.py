"""DPO, online: of four texts for each prompt, the best is preferred to the worst.

python examples/train_dpo.py          # or with a budget of tokens: python examples/train_dpo.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import DPO

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 8_192

# DPO has a KL penalty of its own, beta, so the environment's is off. offline=True would draw from the reference model.
envs = gym.make_vec("TextGen-v0", num_envs=32, max_new_tokens=16, kl_coef=0.0)
model = DPO("LanguageModelPolicy", envs, group_size=4, beta=0.1, offline=False, learning_rate=1e-4, seed=0)
model.learn(TOKENS)
figures = model.logger.name_to_value  # of the last update
print(
    f"{figures['train/rewards/accuracies']:.0%} of the pairs are told apart, by {figures['train/rewards/margins']:.2f}"
)
print(model.policy.generate(["the film is", "this story"], seed=0))

"""NLPO: PPO that draws only from the likeliest tokens of a copy of itself that lags behind.

python examples/train_nlpo.py          # or with a budget of tokens: python examples/train_nlpo.py 49152
"""

import sys

import gymnasium as gym

from textgym.agents import NLPO

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 12_288

envs = gym.make_vec("TextGen-v0", num_envs=32, max_new_tokens=16, kl_coef=0.05)
# The mask is the smallest set of tokens that has 90 % of the copy's probability; the copy is renewed every 5 rollouts.
model = NLPO("LanguageModelPolicy", envs, n_steps=16, batch_size=256, mask_top_p=0.9, mask_update_every=5, seed=0)
for part in range(4):
    model.learn(TOKENS // 4, reset_num_timesteps=part == 0)
    last = model.finished_episodes
    score, kl = (sum(episode[name] for episode in last) / len(last) for name in ("score", "kl"))
    print(f"{model.num_timesteps:6,} tokens: score {score:+.2f}, KL {kl:.2f} nats")
print(model.policy.generate(["the film is"], seed=0)[0])

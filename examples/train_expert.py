"""Expert iteration: write four texts for each prompt, keep the best, imitate it.

python examples/train_expert.py          # or with a budget of tokens: python examples/train_expert.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import ExpertIteration

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 8_192

envs = gym.make_vec("TextGen-v0", num_envs=32, max_new_tokens=16, kl_coef=0.0)
# quantile=0.5: of the kept texts, those that are in the better half of the rollout.
model = ExpertIteration(
    "LanguageModelPolicy", envs, group_size=4, keep=1, quantile=0.5, n_epochs=2, learning_rate=1e-4, seed=0
)
for part in range(4):
    model.learn(TOKENS // 4, reset_num_timesteps=part == 0)
    last = model.finished_episodes
    print(f"{model.num_timesteps:6,} tokens: score {sum(episode['score'] for episode in last) / len(last):+.2f}")
best = max(model.finished_episodes, key=lambda episode: episode["score"])
print(f"the best of the last round, {best['score']:+.2f}: {best['prompt']}{best['completion']}")

#!/usr/bin/env bash
# A learning rate that falls with what remains of the training can end below 0, and starts anew with each `learn`.
#
# stable-baselines3 2.9.2, gymnasium 1.4.0, torch 2.13.0, tried in November 2026.
#
# A schedule gets the share of the training that remains, said to go from 1 to 0. The last rollout is collected whole,
# though it may have more steps than are left; then the share is below 0, and `lambda left: rate * left` gives the last
# update a negative rate, with which the optimizer climbs the loss. After `learn(1000)` in rollouts of 256 it is -0.024.
# With `learn(1)`, to look at one rollout, it is -255. (`LinearSchedule`, which SB3 ships, stops at its end.)
#
# Several calls make a saw of it. Someone who divides a training of 4,096 steps into four
# calls of `learn(1024, reset_num_timesteps=False)`, to print or to evaluate between them, may expect it to fall once over
# the four, or from 1 to 0 in each. It does neither: the steps of a call are added to those that were made, so that call k
# begins at 1/k and ends at 0. The rate reaches 0 four times, and no later call begins near the rate that was given.
# `reset_num_timesteps=True` gives 1 to 0 in each. One call of `learn` with a callback is what falls once.
#
# Output seen, the learning rate of the last update, and what remains at the first and the last update of each call:
#   learn(1000): -2.4e-05
#   call 1: 0.75 to 0.00
#   call 2: 0.38 to 0.00
#   call 3: 0.25 to 0.00
#   call 4: 0.19 to 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --without-pip "$folder/venv"; python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q stable-baselines3==2.9.2 gymnasium==1.4.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback


class Remaining(BaseCallback):
    def _on_training_start(self):
        self.seen = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):  # the update that follows reads the schedule at num_timesteps
        self.seen.append(1 - self.num_timesteps / self.model._total_timesteps)


short = A2C("MlpPolicy", "CartPole-v1", n_steps=256, learning_rate=lambda left: 1e-3 * left, seed=0, device="cpu")
short.learn(1000)
lines = [f"learn(1000): {short.policy.optimizer.param_groups[0]['lr']:.1e}"]
model, remaining = A2C("MlpPolicy", "CartPole-v1", n_steps=256, seed=0, device="cpu"), Remaining()
for call in range(1, 5):
    model.learn(1024, callback=remaining, reset_num_timesteps=False)
    assert abs(model._current_progress_remaining - remaining.seen[-1]) < 1e-9
    lines.append(f"call {call}: {remaining.seen[0]:.2f} to {remaining.seen[-1]:.2f}")
print(*lines, sep="\n")
expected = ["learn(1000): -2.4e-05"] + [f"call {k}: {3 / (4 * k):.2f} to 0.00" for k in range(1, 5)]
assert lines == expected, f"changed: expected {expected}"
PYTHON

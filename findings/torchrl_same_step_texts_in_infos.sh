#!/usr/bin/env bash
# torchrl 0.14.1: GymWrapper fails on a vector environment in SAME_STEP whose infos hold texts.
#
# GymWrapper takes vector environments that reset in the same step, or not by themselves. In SAME_STEP it reads all
# infos into tensors, wanted or not, and trips over texts: it can't even be constructed. With DISABLED the same
# environment works, and its infos are left alone. Numbers in infos work in both.
#
# Seen with gymnasium 1.4.0, tensordict 0.14 and torch 2.13.0, on Gymnasium's own SyncVectorEnv:
#   SAME_STEP, numbers: steps
#   SAME_STEP, texts: RuntimeError: indexing a tensordict with td.batch_dims==0 is not permitted. Got index 0.
#   DISABLED, numbers: steps
#   DISABLED, texts: steps
#
# What helps: autoreset_mode=AutoresetMode.DISABLED, which torchrl calls preferred.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --without-pip "$folder/venv"; python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "torch==2.13.0" "torchrl==0.14.1" "gymnasium==1.4.0" "numpy<3"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.envs import GymWrapper


class Counts(gym.Env):
    """Three steps long, with one entry in its infos."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, entry):
        self.entry = entry

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {"entry": self.entry}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == 3, False, {"entry": self.entry}


def outcome(mode, entry):
    envs = SyncVectorEnv([lambda: Counts(entry)] * 2, autoreset_mode=mode)
    try:
        GymWrapper(envs).rollout(8, break_when_any_done=False)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return "steps"


found = {}
for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
    for kind, entry in (("numbers", 1.0), ("texts", "hello")):
        found[mode.name, kind] = outcome(mode, entry)
        print(f"{mode.name}, {kind}: {found[mode.name, kind]}")
others = [what for key, what in found.items() if key != ("SAME_STEP", "texts")]
as_seen = set(others) == {"steps"} and found["SAME_STEP", "texts"] != "steps"
raise SystemExit(0 if as_seen else "the behaviour has changed")
PYTHON

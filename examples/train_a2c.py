"""Train a language model with A2C: one step on each rollout, with a value head as critic.

    python examples/train_a2c.py --help
    python examples/train_a2c.py --n-steps 16 --learning-rate 2e-4 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train a2c``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("a2c")

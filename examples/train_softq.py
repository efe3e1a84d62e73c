"""Train a language model with soft Q-learning: its policy is the soft-optimal one of its own Q-values.

    python examples/train_softq.py --help
    python examples/train_softq.py --replay-episodes 2000 --td-lambda 1.0 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train softq``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("softq")

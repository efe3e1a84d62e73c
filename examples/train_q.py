"""Train a language model with Q-learning: the likeliest token is the greedy one, exploring by drawing from the policy.

    python examples/train_q.py --help
    python examples/train_q.py --td-lambda 0.5 --epsilon 1.0 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train q``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("q")

"""Train a language model with SARSA: Q-values of the policy that is followed, from its own episodes.

    python examples/train_sarsa.py --help
    python examples/train_sarsa.py --td-lambda 0.9 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train sarsa``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("sarsa")

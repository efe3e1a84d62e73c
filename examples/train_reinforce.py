"""Train a language model with REINFORCE: the policy gradient from whole episodes, with a baseline.

    python examples/train_reinforce.py --help
    python examples/train_reinforce.py --baseline mean --normalize-advantage rollout --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train reinforce``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("reinforce")

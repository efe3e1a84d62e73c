"""Train a language model with NLPO: PPO whose tokens come from the likeliest ones of a lagging copy.

    python examples/train_nlpo.py --help
    python examples/train_nlpo.py --mask-top-p 0.9 --mask-update-every 5 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train nlpo``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("nlpo")

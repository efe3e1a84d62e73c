"""Train a language model with GRPO: completions of one prompt over their standard deviation, with PPO's ratios.

    python examples/train_grpo.py --help
    python examples/train_grpo.py --group-size 8 --loss-type dr_grpo --scale none --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train grpo``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("grpo")

"""The command ``textgym`` and its subcommands, and RL Baselines3 Zoo with our agents."""

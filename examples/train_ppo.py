"""Train a language model with PPO: every hyperparameter and option of the environment is a flag.

    python examples/train_ppo.py --help
    python examples/train_ppo.py --prompts my.jsonl --reward my_reward.py:score --kl-coef 0.1 --output runs/mine
    python examples/train_ppo.py --config my.yaml --learning-rate 5e-5     # flags win over the file
    python examples/train_ppo.py --resume runs/mine                        # after a stop, however sudden
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 examples/train_ppo.py   # 8 GPUs

It is the same code as the command ``textgym train ppo``. From Python, a run is an object::

    from textgym.agents.runs import Run, RunConfig

    run = Run("ppo", RunConfig(prompts="my.jsonl", kl_coef=0.1), "runs/mine")
    run.train(progress_bar=True)
    run.agent.policy.generate(["the film is"])
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("ppo")

"""The environment under Ray RLlib: its EnvRunners write texts in processes of their own, and its PPO learns from them.

RLlib gets ``TextGen-v0`` unchanged, and an ``RLModule`` of a dozen lines with the same language model and a value head:

    pip install "ray[rllib]" textgym       # in an environment of its own: RLlib pins the version of Gymnasium
    python examples/rllib_env.py --iterations 3

It is for those who have their experiments in RLlib. Every step is a forward over the whole text, because an RLModule
sees one observation and no cache, and a KL penalty would need the policy's probabilities, which RLlib does not give to
the environment, so ``kl_coef`` is 0. ``textgym.agents.PPO`` does neither; docs/scaling_out.md says how it uses
several machines.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.tune import register_env

import textgym  # noqa: F401  registers the environment ids
from textgym.language_model import load_language_model


class LanguageModelModule(TorchRLModule, ValueFunctionAPI):
    """Next-token logits and a value from the last hidden state, for observations of ``TextGen-v0``."""

    def setup(self) -> None:
        model = load_language_model(self.model_config["language_model"], device="cpu").trainable_copy().model
        self.transformer = model
        self.value_head = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def _hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        """``(B, H)`` of the last token of each row."""
        observation = batch[Columns.OBS]
        mask = observation["attention_mask"].long()  # (B, L)
        hidden = self.transformer.base_model(observation["input_ids"].long(), attention_mask=mask).last_hidden_state
        return hidden[torch.arange(len(mask)), mask.sum(1).clamp(min=1) - 1]

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        hidden = self._hidden(batch)
        return {Columns.ACTION_DIST_INPUTS: self.transformer.get_output_embeddings()(hidden)}  # (B, V)

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """``(B,)`` V of the observations."""
        return self.value_head(self._hidden(batch).float()).squeeze(-1)


def make_env(options: dict[str, Any]) -> gym.Env[Any, Any]:
    """What each EnvRunner calls for each of its environments."""
    return gym.make("TextGen-v0", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=3, help="rollouts and updates (default %(default)s)")
    parser.add_argument("--env-runners", type=int, default=2, help="processes that write texts (default %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="environments of each (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="budget of a text (default %(default)s)")
    parser.add_argument("--model", default="embedded", help="as in gym.make (default %(default)s)")
    arguments = parser.parse_args()

    register_env("TextGen", make_env)
    options = {
        "language_model": arguments.model,
        "max_new_tokens": arguments.max_new_tokens,
        "max_prompt_tokens": 32,
        "kl_coef": 0.0,
        "device": "cpu",
    }
    batch = arguments.env_runners * arguments.rows * arguments.max_new_tokens
    config = (
        PPOConfig()
        .environment("TextGen", env_config=options)
        .env_runners(
            num_env_runners=arguments.env_runners,
            num_envs_per_env_runner=arguments.rows,
            rollout_fragment_length=arguments.max_new_tokens,
        )
        .training(
            train_batch_size_per_learner=batch,
            minibatch_size=max(1, batch // 4),
            num_epochs=2,
            lr=1e-4,
            gamma=1.0,
            lambda_=0.95,
            use_kl_loss=False,
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=LanguageModelModule, model_config={"language_model": arguments.model}
            )
        )
    )
    algorithm = config.build_algo()
    for iteration in range(arguments.iterations):
        runners = algorithm.train()["env_runners"]
        print(
            f"iteration {iteration + 1}: {runners['num_env_steps_sampled_lifetime']:.0f} tokens, "
            f"mean reward {runners['episode_return_mean']:+.3f}, {runners['episode_len_mean']:.1f} tokens per text"
        )
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()

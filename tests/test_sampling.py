"""One policy, one set of settings: whatever samples from a policy does so as it was trained to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import PROMPTS, count_liked, tiny_env, tiny_language_model, tiny_ppo, tiny_vector_env
from tiny_models import BOS, EOS, PAD, UNK
from written_texts import completed

from textgym.action_masks import masks_of
from textgym.agents import PPO
from textgym.agents.runs import RunConfig
from textgym.agents.runs.held_out import HeldOutPrompts
from textgym.evaluation import completion_log_probs, evaluate, score_tokens
from textgym.generation import complete
from textgym.language_model import LanguageModel, load_language_model
from textgym.prompts.rows import PromptRow
from textgym.rewards import FunctionReward
from textgym.sampling import SamplingSettings

REWARD = FunctionReward(count_liked)
ONLY_ONE: dict[str, Any] = {"action_masking": True, "top_k": 1, "min_new_tokens": 2, "stop": ["film"]}


def only_texts(reference: LanguageModel, prompts: list[str], **settings: Any) -> list[str]:
    """What a mask with top-k 1 leaves of the reference: its most likely allowed token, again and again."""
    env = tiny_vector_env(len(prompts), language_model=reference, prompts=prompts, **{**ONLY_ONE, **settings})
    env.reset(options={"prompt": prompts})
    texts: dict[int, str] = {}
    while len(texts) < len(prompts):
        *_, infos = env.step(env.action_masks().argmax(1))
        final = infos.get("final_info", {})
        for row in np.flatnonzero(final.get("_completion", [])):
            texts.setdefault(int(row), final["completion"][row])
    return [texts[row] for row in range(len(prompts))]


@pytest.fixture
def far_from_its_reference() -> PPO:
    """A policy that left its reference behind, and was trained under a mask that leaves one text of each prompt."""
    model = tiny_ppo(tiny_vector_env(4, **ONLY_ONE), learning_rate=0.0)
    with torch.no_grad():
        for parameter in model.policy.transformer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_what_samples_from_a_masked_policy_writes_the_only_allowed_text(far_from_its_reference, tmp_path):
    model = far_from_its_reference
    envs = model.get_env().unwrapped.text_env
    reference = envs.reference_language_model()
    allowed = only_texts(reference, PROMPTS)
    assert allowed != model.policy.generate(PROMPTS, seed=0, action_masking=False, top_k=0)

    assert model.policy.generate(PROMPTS, seed=0) == allowed
    prompts = HeldOutPrompts([PromptRow(prompt) for prompt in PROMPTS], RunConfig(eval_prompts=4))
    held_out = prompts.evaluate(model, envs)
    assert held_out.completions == allowed
    np.testing.assert_allclose(held_out.kl, 0, atol=1e-6)  # nothing else could be chosen by either
    np.testing.assert_allclose(held_out.ref_log_prob, 0, atol=1e-6)
    lm = model.policy.language_model
    scored = score_tokens(lm, None, REWARD, PROMPTS, envs.sampling, restricting=reference)
    assert [completion.completion for completion in scored] == allowed

    model.save_pretrained(tmp_path / "saved")
    model.save(tmp_path / "saved.zip")
    opened = PPO.from_pretrained(tmp_path / "saved", device="cpu")
    assert opened.policy.sampling == PPO.load(tmp_path / "saved.zip", trust=True).policy.sampling == envs.sampling
    assert opened.policy.generate(PROMPTS, seed=0, reference=reference) == allowed
    with pytest.raises(ValueError, match=r"top_k=1, top_p=1.0 are those of the reference model: give it"):
        opened.policy.generate(PROMPTS)
    opened.set_env(tiny_vector_env(1, **ONLY_ONE, language_model=reference))
    assert opened.policy.generate(PROMPTS, seed=0) == allowed


def test_masked_texts_have_no_special_tokens_and_no_early_end():
    lm = tiny_language_model()
    sampling = SamplingSettings(max_new_tokens=6, min_new_tokens=3, action_masking=True, temperature=4.0)
    masks = masks_of(sampling, lm, None)
    prompts = [lm.encode(prompt) for prompt in PROMPTS * 20]
    texts = complete(lm, prompts, 6, min_new_tokens=3, temperature=4.0, masks=masks)
    assert not {PAD, BOS, UNK} & {token for text in texts for token in text}
    assert all(EOS not in text[:3] for text in texts)
    assert {len(text) for text in texts} == {4, 5, 6}


@pytest.mark.parametrize("restriction", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.9}])
def test_masked_log_probs_are_those_that_an_agent_and_its_environment_see(restriction):
    """The KL of a text is that which an episode with the same tokens has."""
    policy, reference = tiny_language_model(seed=1), tiny_language_model()
    options = {"action_masking": True, "min_new_tokens": 2, "temperature": 1.5, **restriction}
    sampling = SamplingSettings(max_new_tokens=8, **options)
    masks = masks_of(sampling, policy, reference)
    how = {"masks": masks, "generator": torch.Generator().manual_seed(0)}
    batch = completed(policy, PROMPTS, how, max_new_tokens=8, **options)
    own, ref = (completion_log_probs(lm, batch, 1.5, masks) for lm in (policy, reference))
    agent = tiny_ppo(tiny_env(**options), batch_size=None, policy_kwargs={"language_model": policy})
    env = tiny_env(**options, language_model=reference)
    for row, prompt in enumerate(PROMPTS):
        observation, _ = env.reset(options={"prompt": prompt})
        log_probs, kl = [], []
        for token in batch.completion_ids[row]:
            observations = {name: value[None] for name, value in observation.items()}
            distribution = agent.policy.get_distribution(observations, env.action_masks()[None])
            log_probs.append(float(distribution.log_prob(torch.tensor([token])).detach()))
            env.report_log_prob(min(log_probs[-1], 0.0))
            observation, *_, info = env.step(token)
            kl.append(info["kl"])
        assert own[row] == pytest.approx(sum(log_probs), abs=1e-4)
        assert own[row] - ref[row] == pytest.approx(sum(kl), abs=1e-4)


def test_a_policy_generates_with_the_settings_of_its_environment():
    model = tiny_ppo(tiny_vector_env(4, max_new_tokens=5, stop="film", temperature=0.7))
    assert model.policy.sampling == SamplingSettings(
        max_new_tokens=5, max_prompt_tokens=64, temperature=0.7, stop=("film",)
    )
    texts = model.policy.generate(PROMPTS * 8, seed=0)
    assert any(text.endswith("film") for text in texts)
    assert all("film" not in text.removesuffix("film") for text in texts)
    freely = model.policy.generate(PROMPTS * 8, seed=0, stop=[], max_new_tokens=20)
    assert any("film" in text.removesuffix("film") for text in freely)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        model.policy.generate(PROMPTS, max_tokens=3)


def test_an_evaluation_says_how_it_sampled():
    lm = tiny_language_model()
    sampling = SamplingSettings(max_new_tokens=4, action_masking=True, top_p=0.5, stop=("film",))
    result = evaluate(lm, lm, REWARD, PROMPTS, sampling, temperature=2.0)
    expected = {**sampling.as_dict(), "temperature": 2.0}
    assert {name: result.settings[name] for name in expected} == expected
    assert SamplingSettings.from_dict(expected).said() == (
        "at most 4 tokens, temperature 2, stop at 'film', special tokens masked, top-p 0.5 of the reference"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3}, "they need action_masking=True"),
        ({"top_p": 1.5, "action_masking": True}, "top_p=1.5 must be a finite number greater than 0 and at most 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number at least 1e-06"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, at least 1"),
        ({"stop": [""]}, "stop="),
        ({"top_z": 3}, "'top_z' is not a setting of sampling; they are max_new_tokens"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings.from_dict(settings)


def test_a_reference_with_other_tokens_restricts_nothing():
    sampling = SamplingSettings(action_masking=True, top_k=1)
    with pytest.raises(ValueError, match=r"has 4096 tokens and the model 64"):
        masks_of(sampling, tiny_language_model(), load_language_model())

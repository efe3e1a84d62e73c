"""Encoder-decoders (T5, BART) as policy, reference and reward model: the same identities as for decoder-only models.

What is computed is compared with the plain forwards of transformers: the prompt as ``input_ids``, start token and
completion as ``decoder_input_ids``, one row at a time, without a cache and without padding.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch
from stock_twins import assert_same_update, stock_twin, with_rollout
from tiny_agents import PROMPTS, count_liked, logs_of_learning, tiny_ppo, tiny_vector_env, values_of
from tiny_encoder_decoders import ending_tokenizer, t5_config, tiny_encoder_decoder
from tiny_models import EOS, PAD, VOCABULARY, tiny_causal_reward_model, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from textgym import agents
from textgym.agents import PPO
from textgym.engine.encoder_decoder import CachedEncoderDecoder, EncoderDecoder, GroupedEncoderDecoder
from textgym.engine.exactness import fast_machine
from textgym.envs import TextGenVectorEnv
from textgym.evaluation import evaluate, token_log_probs
from textgym.generation import complete
from textgym.language_model import LanguageModel, load_language_model
from textgym.lora import add_lora
from textgym.rewards import CausalRewardModel, ClassifierReward, LogProbReward, as_reward
from textgym.rewards.learned.causal_discriminator import CausalDiscriminator

KINDS = {"t5": CachedEncoderDecoder, "t5 1.1": CachedEncoderDecoder, "bart": GroupedEncoderDecoder}


def opened(name: str = "t5", seed: int = 0) -> LanguageModel:
    """How an architecture is stepped is found out once, which takes longer than what many a test does with it."""
    return LanguageModel(tiny_encoder_decoder(name, seed), ending_tokenizer(), "mine", like=_first_of(name))


@cache
def _first_of(name: str) -> LanguageModel:
    return LanguageModel(tiny_encoder_decoder(name), ending_tokenizer(), "mine")


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: np.ndarray, prompt_length: int) -> Tensor:
    """Logits ``(T + 1, V)`` behind the start token and each token of the completion, from transformers alone."""
    decoder_ids = [model.config.decoder_start_token_id, *ids[prompt_length:].tolist()]
    return model(
        input_ids=torch.as_tensor(ids[None, :prompt_length]),
        decoder_input_ids=torch.tensor([decoder_ids]),
        use_cache=False,
    ).logits[0]


def batch_of(tokenizer: PreTrainedTokenizerBase, rows: int = 4, seed: int = 0, ends: bool = True) -> Any:
    """Random prompts, ended as the tokenizer ends them, and random completions, some of which end."""
    rng = np.random.default_rng(seed)
    prompts = [[*rng.integers(4, len(VOCABULARY), n).tolist(), *[EOS] * ends] for n in rng.integers(1, 9, rows)]
    completions = [rng.integers(4, len(VOCABULARY), n).tolist() for n in rng.integers(1, 15, rows)]
    return prefix_batch(tokenizer, prompts, [c + [EOS] * (i % 2) for i, c in enumerate(completions)])


T5 = opened()


# --- stepping


class Walk:
    """Rows that change between calls in every way a caller's rows can."""

    def __init__(self, rows: int, width: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = self.rng.integers(4, len(VOCABULARY), (rows, width))
        self.prompt_lengths = self.rng.integers(1, width // 2, rows)
        self.lengths = self.prompt_lengths.copy()

    def change(self, row: int) -> None:
        width, kind = self.ids.shape[1], self.rng.choice(["one", "one", "one", "many", "cut", "new", "prompt", "other"])
        prompt = self.prompt_lengths[row]
        if kind in ("one", "many"):
            self.lengths[row] = min(width, self.lengths[row] + (1 if kind == "one" else self.rng.integers(2, 6)))
        elif kind == "cut":
            self.lengths[row] = self.rng.integers(prompt, self.lengths[row] + 1)
        elif kind == "prompt":  # the same tokens, but another number of them is the prompt
            self.prompt_lengths[row] = self.rng.integers(1, self.lengths[row] + 1)
        elif kind == "other":
            self.ids[row, self.rng.integers(prompt, width) :] = self.rng.integers(4, len(VOCABULARY))
        else:
            self.ids[row] = self.rng.integers(4, len(VOCABULARY), width)
            self.lengths[row] = self.prompt_lengths[row] = self.rng.integers(1, width // 2)


def assert_steps_are_exact(
    lm: LanguageModel, machine: EncoderDecoder, seed: int, steps: int, kind: type[Walk] = Walk
) -> None:
    walk = kind(rows=5, width=machine.context, seed=seed)
    for _ in range(steps):
        rows = walk.rng.permutation(5)[: walk.rng.integers(1, 6)]
        if walk.rng.random() < 0.5:
            rows = np.arange(5)
        got = lm.head(machine.last_hidden(walk.ids[rows], walk.lengths[rows], rows, walk.prompt_lengths[rows]))
        for logits, row in zip(got, rows.tolist(), strict=True):
            expected = plain_logits(lm.model, walk.ids[row, : walk.lengths[row]], walk.prompt_lengths[row])[-1]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for row in rows.tolist():
            walk.change(row)


@pytest.mark.parametrize("name", KINDS)
def test_stepping_equals_the_plain_forward_of_each_row(name):
    lm = opened(name)
    machine = lm.cached(24)
    assert type(machine) is KINDS[name]
    assert_steps_are_exact(lm, machine, seed=0, steps=25)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_whatever_happens_to_the_rows_between_calls(seed):
    assert_steps_are_exact(T5, T5.cached(16), seed, steps=8)


@pytest.mark.parametrize("name", KINDS)
def test_without_a_cache_the_states_are_the_same(name):
    lm = opened(name)
    assert_steps_are_exact(lm, EncoderDecoder(lm.model, 24), seed=1, steps=10)


@pytest.mark.parametrize("name", KINDS)
def test_teacher_forced_log_probs_equal_those_of_the_plain_forward(name):
    lm = opened(name)
    batch = batch_of(lm.tokenizer, rows=6)
    assert len(set(batch.prompt_lengths)) > 2
    for i, got in enumerate(token_log_probs(lm, batch, temperature=0.8)):
        ids, prompt = batch.input_ids[i, : batch.lengths[i]], int(batch.prompt_lengths[i])
        expected = (plain_logits(lm.model, ids, prompt)[:-1] / 0.8).log_softmax(-1)
        np.testing.assert_allclose(got, expected[np.arange(len(ids) - prompt), ids[prompt:]], atol=1e-4)


def test_the_loss_of_teacher_forced_tokens_is_that_of_transformers_and_reaches_the_encoder():
    lm = LanguageModel(tiny_encoder_decoder(), ending_tokenizer()).trainable_copy()
    batch = batch_of(lm.tokenizer, rows=1)
    prompt, length = int(batch.prompt_lengths[0]), int(batch.lengths[0])
    labels = torch.as_tensor(batch.input_ids[:, prompt:])
    lm.model(input_ids=torch.as_tensor(batch.input_ids[:, :prompt]), labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    at = np.arange(prompt - 1, length - 1)
    hidden = lm.cached(40).hidden_at(batch.input_ids, batch.lengths, at * 0, at, batch.prompt_lengths)
    (-lm.token_log_probs(hidden, labels[0])[0].mean()).backward()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, parameter in lm.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5 * scale, msg=name)
    assert any(name.startswith("encoder.") for name in expected)


def test_a_prompt_is_encoded_once_and_then_each_step_costs_one_token_a_row():
    lm = opened()
    machine, seen = lm.cached(20), Counter[str]()
    prompts = np.array([3, 5, 2])
    ids = np.random.default_rng(0).integers(4, len(VOCABULARY), (3, 20))
    handles = [
        module.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: seen.update({name: kwargs["input_ids"].numel()}), with_kwargs=True
        )
        for name, module in (("encoder", lm.model.encoder), ("decoder", lm.model.decoder))
    ]
    for step in range(6):
        machine.last_hidden(ids, prompts + step, prompt_lengths=prompts)
        machine.last_hidden(ids, prompts + step, prompt_lengths=prompts)  # asked again: nothing to do
    assert seen == {"encoder": 15, "decoder": 18}  # 3 prompts, padded to 5 tokens; start token and 5 more, of 3 rows
    seen.clear()
    ids[1] = ids[1, ::-1]  # an episode begins in one of the rows
    machine.last_hidden(ids, np.where([False, True, False], 4, prompts + 5), prompt_lengths=np.array([3, 4, 2]))
    assert seen == {"encoder": 4, "decoder": 1}
    for handle in handles:
        handle.remove()


def test_new_weights_are_noticed():
    lm = opened().trainable_copy()
    machine, prompts = lm.cached(12), np.array([3, 4])
    ids = np.random.default_rng(0).integers(4, len(VOCABULARY), (2, 12))
    machine.last_hidden(ids, prompts + 3, prompt_lengths=prompts)
    with torch.no_grad():
        lm.model.encoder.block[0].layer[0].SelfAttention.v.weight.add_(0.3)
    got = lm.head(machine.last_hidden(ids, prompts + 4, prompt_lengths=prompts))
    for row, prompt in enumerate(prompts.tolist()):
        expected = plain_logits(lm.model, ids[row, : prompt + 4], prompt)[-1]
        torch.testing.assert_close(got[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_deterministic_completions_equal_those_of_generate(name):
    lm = opened(name)
    prompts = [[5, 6, 7, EOS], [20, 21, EOS], [30, 31, 32, 33, 34, 35, EOS]]
    for prompt, completion in zip(prompts, complete(lm, prompts, 12, deterministic=True), strict=True):
        ids = torch.tensor([prompt])
        generated = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, num_beams=1, use_cache=False
        )
        assert completion == generated[0, 1:].tolist()  # behind the start token


def test_attention_in_its_eager_form_gives_the_same():
    model = tiny_encoder_decoder()
    model.set_attn_implementation("eager")
    lm = LanguageModel(model, ending_tokenizer())
    assert type(lm.cached(16)) is CachedEncoderDecoder
    assert_steps_are_exact(lm, lm.cached(16), seed=2, steps=8)


def test_a_decoder_that_no_cache_can_serve_is_stepped_by_whole_prefixes_with_a_warning(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no cache today")

    monkeypatch.setattr("textgym.engine.encoder_decoder.EncoderDecoderCache", refuse)
    lm = LanguageModel(tiny_encoder_decoder(), ending_tokenizer(), "mine")
    assert fast_machine(lm._stepping._stepped)[0] is EncoderDecoder
    with pytest.warns(UserWarning, match="exact but slow: a cache .* can't drive it .*no cache today"):
        machine = lm.cached(16)
    assert type(machine) is EncoderDecoder
    assert_steps_are_exact(lm, machine, seed=3, steps=6)


# --- texts


def test_prompts_end_as_the_tokenizer_ends_them():
    """T5 was trained on inputs that end in EOS; completions are the decoder's and end when it says so."""
    with pytest.warns(UserWarning, match="a prompt of 4 tokens is longer"):
        env = tiny_vector_env(1, language_model=opened(), prompts=["the film is"], max_prompt_tokens=2)
    observation, _ = env.reset(seed=0)
    assert observation["prompt_length"].item() == 2
    assert observation["input_ids"][0, :3].tolist() == [VOCABULARY.index("is"), EOS, PAD]
    assert env.vocabulary.encode("the film") == ending_tokenizer()("the film")["input_ids"]
    lm = LanguageModel(tiny_encoder_decoder(), tiny_tokenizer())  # one that ends nothing
    assert lm.encode("the film") == [4, VOCABULARY.index("film")]


def test_completions_are_what_the_decoder_wrote():
    lm = opened()
    batch = batch_of(lm.tokenizer)
    assert [c.split() for c in batch.completions] == [
        [VOCABULARY[i] for i in ids if i != EOS] for ids in batch.completion_ids
    ]


# --- policy and reference


@pytest.mark.parametrize("scoring", ["deferred", "instant"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_ppo_learns_with_ratio_one_first_and_no_kl_at_the_start(name, scoring):
    env = tiny_vector_env(3, language_model=opened(name), prompts=PROMPTS, reward=count_liked)
    agent = tiny_ppo(env, scoring=scoring, n_steps=13, batch_size=12, n_epochs=2, learning_rate=1e-2)
    before = agent.policy.parameters_to_vector()
    logs = logs_of_learning(agent, 78)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4  # of the first rollout
    assert abs(values_of(logs, "rollout/kl_ref")[-1]) > 1e-3
    assert not np.allclose(before, agent.policy.parameters_to_vector())


@pytest.mark.parametrize("name", ["A2C", "REINFORCE", "RLOO", "GRPO"])
def test_the_other_on_policy_agents_learn_with_no_kl_at_the_start(name):
    env = tiny_vector_env(4, language_model=opened(), prompts=PROMPTS, reward=count_liked)
    agent = getattr(agents, name)("LanguageModelPolicy", env, learning_rate=1e-2, seed=0, device="cpu")
    before = agent.policy.parameters_to_vector()
    logs = logs_of_learning(agent, 160)
    assert max(values_of(logs, "train/ratio_first"), default=0.0) < 1e-4  # of those that have a ratio
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4
    assert not np.allclose(before, agent.policy.parameters_to_vector())


@pytest.mark.parametrize("name", ["NLPO", "TRPO", "SoftQLearning", "QLearning", "SARSA", "ExpertIteration", "DPO"])
def test_agents_with_lagging_copies_references_and_targets_learn_too(name):
    env = tiny_vector_env(4, language_model=opened(), prompts=PROMPTS, reward=count_liked)
    agent = getattr(agents, name)("LanguageModelPolicy", env, seed=0, device="cpu")
    before = agent.policy.parameters_to_vector()
    logs = logs_of_learning(agent, 160)
    assert np.isfinite(values_of(logs, "rollout/score_mean")).all()
    assert not np.allclose(before, agent.policy.parameters_to_vector())


def test_segments_know_where_the_prompt_ends():
    env = tiny_vector_env(3, language_model=opened(), max_new_tokens=30)
    agent = tiny_ppo(env, n_steps=7)
    callback = agent._setup_learn(1000)[1]
    for _ in range(3):  # the episodes go on from rollout to rollout
        assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
        batch = next(agent.rollout_buffer.get())
        with torch.no_grad():
            _, log_prob, _ = agent.policy.evaluate_segments(batch)
        torch.testing.assert_close(log_prob, batch.old_log_prob, atol=1e-4, rtol=0)
    segments = agent.rollout_buffer.segments
    assert any(len(s.prefix) > s.prompt_length for s in segments)
    for segment in segments:
        assert segment.prefix[segment.prompt_length - 1] == EOS


def moved(**arguments: Any) -> PPO:
    return with_rollout(tiny_vector_env(4, language_model=opened(), temperature=0.9), 0.01, **arguments)


@pytest.mark.parametrize("clip_range_vf", [None, 0.05])
def test_one_update_equals_stock_ppo(clip_range_vf):
    agent = moved(clip_range_vf=clip_range_vf, clip_range=0.1, ent_coef=0.01, max_grad_norm=0.5)
    batch = next(agent.rollout_buffer.get())
    with torch.no_grad():
        ratio = (agent.policy.evaluate_segments(batch)[1] - batch.old_log_prob).exp()
    assert 0.1 < ((ratio - 1).abs() > 0.1).float().mean() < 0.95  # otherwise a wrong clip would go unnoticed
    assert_same_update(agent, stock_twin(agent))


@pytest.mark.parametrize("kwargs", [{"gradient_checkpointing": True}, {"autocast": "bfloat16"}])
def test_learning_with_less_memory_or_in_a_smaller_type(kwargs):
    env = tiny_vector_env(3, language_model=opened())
    agent = tiny_ppo(env, n_steps=12, policy_kwargs=kwargs, learning_rate=1e-3)
    logs = logs_of_learning(agent, 36)
    assert values_of(logs, "train/ratio_first")[0] < (1e-4 if "autocast" not in kwargs else 0.2)


def test_acting_with_a_copy_in_a_smaller_type():
    env = tiny_vector_env(3, language_model=opened())
    agent = tiny_ppo(env, n_steps=12, policy_kwargs={"rollout_dtype": "bfloat16"})
    logs = logs_of_learning(agent, 36)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert 0 < values_of(logs, "rollout/log_ratio_abs")[0] < 0.2


def test_action_masks_of_the_reference_are_those_of_its_plain_forward():
    env = tiny_vector_env(3, language_model=opened(), action_masking=True, top_k=5)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(12):
        masks, texts = env.action_masks(), env._episodes.texts
        for row, length in enumerate(texts.lengths.tolist()):
            logits = plain_logits(
                env.reference_language_model().model, texts.ids[row, :length], int(texts.prompt_lengths[row])
            )[-1]
            logits[env.vocabulary.special_token_ids] = -torch.inf
            assert set(np.flatnonzero(masks[row])) == set(logits.topk(5).indices.tolist())
        env.step(np.array([rng.choice(np.flatnonzero(mask)) for mask in masks]))


def test_the_reference_reads_prompts_with_its_encoder():
    env = tiny_vector_env(3, language_model=opened())
    env.reset(seed=0)
    rng, texts = np.random.default_rng(0), env._episodes.texts
    for _ in range(20):
        before = [(texts.ids[row, :n].copy(), int(texts.prompt_lengths[row])) for row, n in enumerate(texts.lengths)]
        actions = np.where(rng.random(3) < 0.2, EOS, rng.integers(4, len(VOCABULARY), 3))
        info = env.step(actions)[-1]
        for row, (ids, prompt) in enumerate(before):
            expected = plain_logits(env.reference_language_model().model, ids, prompt)[-1].log_softmax(-1)[actions[row]]
            infos = info["final_info"] if texts.taken[row] == 0 else info
            assert infos["ref_log_prob"][row] == pytest.approx(float(expected), abs=1e-4)


def test_evaluation_finds_no_kl_between_a_model_and_its_copy_and_some_to_another():
    lm, prompts = opened(), ["the film is", "a very good story and the", "this"]
    kl = [
        evaluate(lm, other, as_reward(count_liked), prompts, max_new_tokens=8, seed=0).kl
        for other in (lm.trainable_copy(), opened(seed=1))
    ]
    np.testing.assert_allclose(kl[0], 0, atol=1e-4)
    assert kl[1].mean() > 1


def test_a_trivial_reward_is_learned():
    env = tiny_vector_env(16, language_model=opened(), reward=count_liked, kl_coef=0.01, max_new_tokens=4)
    agent = tiny_ppo(env, n_steps=16, batch_size=64, learning_rate=6e-3, n_epochs=4)
    scores = values_of(logs_of_learning(agent, 6 * 16 * 16, until=("rollout/score_mean", 0.7)), "rollout/score_mean")
    assert scores[-1] > scores[0] + 0.3


# --- rewards


def t5_classifier(seed: int = 3) -> T5ForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForSequenceClassification(t5_config(num_labels=1))
    with torch.no_grad():
        model.classification_head.out_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


@torch.no_grad()
def plain_score(model: T5ForSequenceClassification, prompt: list[int], completion: list[int]) -> float:
    """The head on the decoder's last state, the prompt encoded and the completion decoded."""
    states = model.transformer(
        input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[PAD, *completion]])
    ).last_hidden_state
    return float(model.classification_head(states[:, -1]))


def test_a_t5_with_a_scalar_head_scores_every_prefix_of_the_completion():
    model, tokenizer = t5_classifier(), ending_tokenizer()
    reward, batch = CausalRewardModel(model, tokenizer), batch_of(tokenizer)
    in_one_pass = reward.prefix_potentials(batch, all_lengths(batch))
    for step in range(int(batch.completion_lengths.max()) + 1):
        lengths = np.minimum(step, batch.completion_lengths)
        stepped = reward.potentials(batch.at(np.arange(4), lengths))
        for row, length in enumerate(lengths.tolist()):
            prompt = batch.input_ids[row, : batch.prompt_lengths[row]].tolist()
            expected = plain_score(model, prompt, batch.completion_ids[row][:length])
            assert stepped[row] == pytest.approx(expected, abs=1e-5)
            assert in_one_pass[row][length] == pytest.approx(expected, abs=1e-5)
    assert np.std(np.concatenate(in_one_pass)) > 0.1


def test_a_decoder_only_policys_tokens_are_read_as_text_by_a_t5_reward_and_the_other_way_round():
    """Their prompts end differently, though the tokenizer is one: T5 wants EOS there, a decoder-only model none."""
    model, tokenizer = t5_classifier(), ending_tokenizer()
    reward, batch = CausalRewardModel(model, tokenizer), batch_of(tokenizer, ends=False)
    assert not reward._same_tokens.of(batch)
    for row, score in enumerate(reward.potentials(batch)):
        prompt = [*batch.input_ids[row, : batch.prompt_lengths[row]].tolist(), EOS]
        assert score == pytest.approx(plain_score(model, prompt, batch.completion_ids[row]), abs=1e-5)
    llama = tiny_causal_reward_model()
    causal, batch = CausalRewardModel(llama, tokenizer), batch_of(tokenizer)
    for row, score in enumerate(causal.potentials(batch)):
        ids = [i for i in batch.input_ids[row, : batch.lengths[row]].tolist() if i != EOS]
        ids += [EOS] * int(batch.finished[row])
        with torch.no_grad():
            assert score == pytest.approx(llama(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)


def test_complete_texts_are_scored_as_their_tokens_are():
    model, tokenizer = t5_classifier(), ending_tokenizer()
    score, empty = CausalRewardModel(model, tokenizer)(prompts=["the film is"] * 2, completions=["good and warm", ""])
    prompt = tokenizer("the film is")["input_ids"]
    words = [VOCABULARY.index(word) for word in ("good", "and", "warm")]
    assert score == pytest.approx(plain_score(model, prompt, [*words, EOS]), abs=1e-5)
    assert empty == pytest.approx(plain_score(model, prompt, [EOS]), abs=1e-5)


def test_a_t5_classifier_of_texts_gives_what_transformers_gives():
    """Its own forward feeds the whole text to the encoder, and shifted by one to the decoder."""
    model, tokenizer = t5_classifier(), ending_tokenizer()
    reward = ClassifierReward(model, tokenizer)
    prompts, completions = ["the film is", "a"], [" good and warm", " story"]
    for prompt, completion, score in zip(
        prompts, completions, reward(prompts=prompts, completions=completions), strict=True
    ):
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)


def reward_named(name: str) -> Any:
    model, tokenizer = t5_classifier(), ending_tokenizer()
    return {"causal": CausalRewardModel, "classifier": ClassifierReward}[name](model, tokenizer)


def stepped(env: TextGenVectorEnv, steps: int = 25) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Rewards of random steps with some end-of-sequence tokens, and the infos."""
    env.reset(seed=0)
    rng, rewards, infos = np.random.default_rng(0), [], []
    for _ in range(steps):
        actions = np.where(rng.random(env.num_envs) < 0.1, EOS, rng.integers(4, len(VOCABULARY), env.num_envs))
        _, reward, _, _, info = env.step(actions, log_probs=-3 * rng.random(env.num_envs))
        rewards.append(reward)
        infos.append(info)
    return rewards, infos


@pytest.mark.parametrize("reward_every", [1, 3, "end"])
@pytest.mark.parametrize("name", ["causal", "classifier"])
def test_both_schedules_pay_the_same(name, reward_every):
    options = {"language_model": opened(), "kl_coef": 0.1, "reward_every": reward_every}
    instant, _ = stepped(tiny_vector_env(4, reward=reward_named(name), **options))
    env = tiny_vector_env(4, reward=reward_named(name), **options)
    env.begin_rollout()
    assert not np.any(stepped(env)[0])
    np.testing.assert_allclose(env.scores().rewards, instant, atol=1e-4)
    assert np.std(instant) > 0.1


@pytest.mark.parametrize("name", ["causal", "classifier"])
def test_rewards_telescope_to_the_final_score(name):
    env = tiny_vector_env(3, language_model=opened(), reward=reward_named(name), kl_coef=0.0)
    env.reset(seed=0)
    start, paid, ended = np.zeros(3), np.zeros(3), 0
    rng = np.random.default_rng(1)
    for _ in range(30):
        env._episodes.note_starts()
        start[paid == 0] = env._episodes.scorer.potential[paid == 0]  # Φ of the prompt, before the first token
        _, reward, terminated, truncated, info = env.step(rng.integers(2, len(VOCABULARY), 3))
        paid += reward
        for row in np.flatnonzero(terminated | truncated):
            assert paid[row] == pytest.approx(info["final_info"]["score"][row] - start[row], abs=1e-5)
            paid[row], ended = 0.0, ended + 1
    assert ended > 5


# --- opening and saving


def test_a_directory_is_opened_as_what_it_is(tmp_path):
    lm = opened("t5 1.1")
    lm.save_pretrained(tmp_path)
    again = load_language_model(tmp_path, device="cpu")
    assert type(again.model) is T5ForConditionalGeneration
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), T5ForConditionalGeneration)
    assert again.encode("the film") == lm.encode("the film")
    batch = batch_of(lm.tokenizer)
    for a, b in zip(token_log_probs(lm, batch), token_log_probs(again, batch), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    env = tiny_vector_env(2, language_model=str(tmp_path), kl_coef=0.0)  # only the vocabulary is opened
    assert env.vocabulary.encode("the film")[-1] == EOS


def test_an_agent_is_saved_and_loaded(tmp_path):
    env = tiny_vector_env(3, language_model=opened())
    agent = tiny_ppo(env, learning_rate=1e-2).learn(36)
    observation = env.observation()
    expected = agent.policy.get_distribution(observation).distribution.logits.detach()
    agent.save(tmp_path / "agent")
    agent.save_pretrained(tmp_path / "folder")
    loaded = PPO.load(tmp_path / "agent", env=tiny_vector_env(3, language_model=opened()), device="cpu", trust=True)
    opened_again = PPO.from_pretrained(tmp_path / "folder", device="cpu")
    for twin in (loaded, opened_again):
        with torch.no_grad():
            torch.testing.assert_close(twin.policy.get_distribution(observation).distribution.logits, expected)
            torch.testing.assert_close(
                twin.policy.predict_values(observation), agent.policy.predict_values(observation)
            )
    loaded.learn(36)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "folder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    prompt = tokenizer("the film is", return_tensors="pt")["input_ids"]
    # Its own cache expects as many layers in the decoder as in the encoder.
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, use_cache=False
    )
    ours = agent.policy.generate(["the film is"], 6, deterministic=True)[0]
    assert ours.split() == tokenizer.decode(written[0], skip_special_tokens=True).split()


def test_predict_takes_one_observation_or_many_and_needs_the_prompt_length():
    env = tiny_vector_env(3, language_model=opened())
    agent = tiny_ppo(env)
    observation, _ = env.reset(seed=0)
    many, _ = agent.predict(observation, deterministic=True)
    one, _ = agent.predict({name: value[1] for name, value in observation.items()}, deterministic=True)
    assert one == many[1]
    del observation["prompt_length"]
    with pytest.raises(ValueError, match="a dict with input_ids, attention_mask and prompt_length"):
        agent.predict(observation)


@pytest.mark.parametrize("lora", [True, {"target_modules": ["q", "v"], "r": 4}])
def test_an_adapter_is_trained_beside_frozen_weights(lora, tmp_path):
    pytest.importorskip("peft")
    env = tiny_vector_env(3, language_model=opened())
    agent = tiny_ppo(env, policy_kwargs={"lora": lora}, learning_rate=1e-2)
    logs = logs_of_learning(agent, 72)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4
    trained = {name for name, p in agent.policy.transformer.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any("EncDecAttention" in name for name in trained)
    agent.save_pretrained(tmp_path)
    observation = env.observation()
    merged = PPO.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            merged.policy.get_distribution(observation).distribution.logits,
            agent.policy.get_distribution(observation).distribution.logits,
            atol=1e-4,
            rtol=1e-4,
        )


def test_the_adapters_own_folder_says_what_kind_of_model_it_is_for(tmp_path):
    peft = pytest.importorskip("peft")
    add_lora(opened(), True).save_adapter(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type == "SEQ_2_SEQ_LM"


# --- refused


def test_compiling_is_refused():
    env = tiny_vector_env(2, language_model=opened())
    with pytest.raises(ValueError, match="compile=True: language_model=mine is an encoder-decoder"):
        tiny_ppo(env, policy_kwargs={"compile": True})


def test_an_encoder_decoder_that_does_not_say_how_completions_begin_is_refused():
    model = tiny_encoder_decoder()
    del model.config.decoder_start_token_id
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="no decoder_start_token_id.*set it in model.config"):
        LanguageModel(model, tiny_tokenizer())


def test_an_environment_without_prompt_lengths_is_refused():
    env = tiny_vector_env(2, language_model=opened())
    agent = tiny_ppo(env)
    space = type(env.single_observation_space)(
        {n: s for n, s in env.single_observation_space.items() if n != "prompt_length"}
    )
    with pytest.raises(ValueError, match="mine is an encoder-decoder: observations need prompt_length"):
        type(agent.policy)(space, env.single_action_space, lambda _: 1e-3, language_model=opened())


def test_rewards_that_read_one_text_refuse_an_encoder_decoder():
    with pytest.raises(ValueError, match="model=mine is an encoder-decoder; .* decoder-only"):
        LogProbReward(opened())
    with pytest.raises(ValueError, match="T5ForSequenceClassification is an encoder-decoder; a discriminator"):
        CausalDiscriminator(t5_classifier(), ending_tokenizer())


def test_wrong_prompt_lengths_are_errors():
    machine = opened().cached(12)
    ids, lengths = np.full((2, 12), 5), np.array([6, 4])
    with pytest.raises(ValueError, match="an encoder-decoder needs prompt_lengths"):
        machine.last_hidden(ids, lengths)
    for wrong, match in (
        (np.array([3]), r"prompt_lengths has shape \(1,\), expected \(2,\)"),
        (np.array([3, 5]), r"prompt_lengths\[1\]=5 must lie between 1 and its row's 4 tokens"),
        (np.array([0, 3]), r"prompt_lengths\[0\]=0 must lie"),
    ):
        with pytest.raises(ValueError, match=match):
            machine.last_hidden(ids, lengths, prompt_lengths=wrong)
    with pytest.raises(ValueError, match=r"positions\[1\]=1 lies within the 3 tokens of its prompt"):
        machine.hidden_at(ids, lengths, np.array([0, 1]), np.array([4, 1]), np.array([2, 3]))

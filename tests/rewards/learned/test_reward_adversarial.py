"""The discriminators, and rewards that learn from a training: what they see, what is logged, and exact resumption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prefix_batches import all_lengths, text_batch
from sklearn.linear_model import LogisticRegression
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from stopped_trainings import Log, StopAfter
from tiny_agents import count_liked, logs_of_learning, tiny_env, tiny_ppo, tiny_vector_env, values_of
from tiny_models import tiny_causal_reward_model, tiny_tokenizer
from torch.nn import functional as F

from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.agents.callbacks.learning_rewards import LearningRewards
from textgym.rewards import (
    AdversarialReward,
    CausalDiscriminator,
    FunctionReward,
    HashingDiscriminator,
    LearningReward,
    NoveltyReward,
    RewardError,
    Router,
    RunningNormalized,
    learn_from,
)

TOKENIZER = tiny_tokenizer()
HUMAN = ["the film is good and warm .", "a very good story and cast .", "this film was moving , and funny !"] * 4
POLICY = [" slow slow dull the the", " weak in of of for", " dull dull dull cold", " the the a a empty"]
PROMPTS = ["the film is", "a very good", "this", "we like the story and"]


def causal(seed: int = 1, learning_rate: float = 3e-3) -> CausalDiscriminator:
    return CausalDiscriminator(tiny_causal_reward_model(seed), TOKENIZER, learning_rate=learning_rate)


DISCRIMINATORS = {"hashing": HashingDiscriminator, "causal": causal}


@pytest.fixture(params=DISCRIMINATORS)
def discriminator(request):
    return DISCRIMINATORS[request.param]()


# --- the reward


def test_it_learns_to_tell_the_policys_texts_from_peoples(discriminator):
    reward = AdversarialReward(HUMAN, discriminator)
    accuracies = []
    for _ in range(15):
        reward.observe(prompts=PROMPTS, completions=POLICY)
        accuracies.append(reward.metrics()["adversarial/accuracy"])
    assert np.mean(accuracies[-3:]) > 0.95
    human, policy = reward(prompts=["", ""], completions=[HUMAN[0], "the film is" + POLICY[0]])
    assert human > 0.8
    assert policy < 0.2
    # New texts of the same kinds, which it has not seen.
    human, policy = reward(prompts=["", ""], completions=["a moving and funny film .", "this dull dull cold of of"])
    assert human > policy + 0.2


def test_a_policy_that_copies_people_can_not_be_told_from_them():
    reward = AdversarialReward(HUMAN, HashingDiscriminator())
    accuracies = []
    for i in range(60):
        reward.observe(prompts=[""] * 4, completions=[HUMAN[(i + j) % len(HUMAN)] for j in range(4)])
        accuracies.append(reward.metrics()["adversarial/accuracy"])
    assert abs(np.mean(accuracies[20:]) - 0.5) < 0.1


def test_length_alone_tells_nothing():
    """The policy writes people's texts, only longer: both are cut to one length, so nothing can be learned."""
    reward = AdversarialReward(["good film"] * 4)
    for _ in range(30):
        reward.observe(prompts=[""] * 4, completions=["good film and story and cast and music"] * 4)
    assert reward.metrics()["adversarial/accuracy"] == pytest.approx(0.5)


@pytest.mark.parametrize("output", ["probability", "log", "logit"])
def test_what_is_paid_is_a_function_of_the_logit(output, discriminator):
    reward = AdversarialReward(HUMAN, discriminator, output=output)
    for _ in range(3):
        reward.observe(prompts=PROMPTS, completions=POLICY)
    logits = torch.tensor(discriminator.logits([p + c for p, c in zip(PROMPTS, POLICY, strict=True)]))
    expected = {"probability": torch.sigmoid, "log": F.logsigmoid, "logit": lambda x: x}[output](logits)
    np.testing.assert_allclose(reward(prompts=PROMPTS, completions=POLICY), expected, rtol=1e-9)


def test_prefixes_are_scored_alike_one_by_one_and_all_at_once(discriminator):
    reward = AdversarialReward(HUMAN, discriminator)
    reward.observe(prompts=PROMPTS, completions=POLICY)
    batch = text_batch(TOKENIZER, PROMPTS, POLICY)
    at = all_lengths(batch)
    at_once = reward.prefix_potentials(batch, at)
    for t in range(5):
        lengths = np.minimum(batch.completion_lengths, t)
        stepped = reward.potentials(batch.at(np.arange(4), lengths))
        np.testing.assert_allclose(stepped, [row[n] for row, n in zip(at_once, lengths, strict=True)], atol=1e-5)
    # After learning more, nothing of the old weights is left in a cache.
    reward.observe(prompts=PROMPTS, completions=POLICY)
    np.testing.assert_allclose(
        reward.potentials(batch), [row[-1] for row in reward.prefix_potentials(batch, at)], atol=1e-5
    )


def test_scoring_learns_nothing(discriminator):
    reward = AdversarialReward(HUMAN, discriminator)
    reward.observe(prompts=PROMPTS, completions=POLICY)
    first = reward(prompts=PROMPTS, completions=POLICY)
    reward.prefix_potentials(text_batch(TOKENIZER, PROMPTS, POLICY), [np.arange(3)] * 4)
    assert reward(prompts=PROMPTS, completions=POLICY) == first


def test_hashed_features_are_separated_as_well_as_by_sklearns_logistic_regression():
    rng = np.random.default_rng(0)
    words = {1: "good warm fine film story moving".split(), 0: "dull slow weak film story cold".split()}

    def sample(count):
        labels = rng.integers(0, 2, count)
        return [" ".join(rng.choice(words[y], 4)) for y in labels.tolist()], labels.astype(float)

    discriminator = HashingDiscriminator(size=1 << 12)
    train, labels = sample(300)
    losses = [discriminator.fit(train, labels) for _ in range(3)]
    assert losses[0] == pytest.approx(np.log(2))
    assert losses[2] < losses[1] < losses[0]
    test, truth = sample(300)
    own = np.mean((discriminator.logits(test) > 0) == truth)

    def features(texts):
        rows = np.zeros((len(texts), discriminator.size))
        for row, text in zip(rows, texts, strict=True):
            columns, values = discriminator._features(text)
            row[columns[:-1]] = values[:-1]
        return rows

    theirs = LogisticRegression().fit(features(train), labels).score(features(test), truth)
    assert own > theirs - 0.03


def test_the_causal_loss_is_the_cross_entropy_of_the_models_own_outputs():
    discriminator = causal()
    texts, labels = ["the film is good", "a", ""], np.array([1.0, 0.0, 1.0])
    expected = []
    for text, label in zip(texts[:2], labels, strict=False):
        ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            outputs = [discriminator.model(input_ids=ids[:, : n + 1]).logits[0, 0] for n in range(ids.shape[1])]
        target = torch.full((len(outputs),), label, dtype=torch.float32)
        expected.append(F.binary_cross_entropy_with_logits(torch.stack(outputs), target).item())
    assert discriminator.fit(texts, labels) == pytest.approx(np.mean(expected), rel=1e-5)
    assert not discriminator.model.training
    assert discriminator.logits([""]).tolist() == [0.0]
    assert discriminator.fit([""], np.array([1.0])) == 0.0


def test_half_precision_is_trained_in_float32_and_a_broken_loss_is_an_error():
    discriminator = CausalDiscriminator(tiny_causal_reward_model().half(), TOKENIZER, learning_rate=1e-3)
    assert discriminator.model.dtype == torch.float32
    labels = np.tile([1.0, 0.0], 2)
    losses = [discriminator.fit([HUMAN[0], POLICY[0], HUMAN[1], POLICY[1]], labels) for _ in range(10)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        discriminator.model.score.weight[0, 0] = torch.nan
    before = [parameter.clone() for parameter in discriminator.model.base_model.parameters()]
    with pytest.raises(RewardError, match="its loss is nan, so it was left as it is"):
        discriminator.fit([HUMAN[0]], np.array([1.0]))
    assert all(map(torch.equal, before, discriminator.model.base_model.parameters()))


def test_a_saved_discriminator_goes_on_as_the_one_that_was_not_stopped(discriminator):
    kind = type(discriminator)
    first = AdversarialReward(HUMAN, discriminator, seed=3)
    first.observe(prompts=PROMPTS, completions=POLICY)
    second = AdversarialReward(HUMAN, causal(seed=7) if kind is CausalDiscriminator else HashingDiscriminator(seed=9))
    second.load_state_dict(first.state_dict())
    assert second.metrics() == first.metrics()
    for _ in range(2):
        for reward in (first, second):
            reward.observe(prompts=PROMPTS, completions=POLICY)
    assert second(prompts=PROMPTS, completions=POLICY) == first(prompts=PROMPTS, completions=POLICY)


def test_wrong_states_and_arguments_are_refused():
    with pytest.raises(ValueError, match="has a discriminator, the given state"):
        AdversarialReward(HUMAN).load_state_dict({"mean": 0.0})
    with pytest.raises(ValueError, match=r"has size=8, the given state has weights of shape \(17,\)"):
        HashingDiscriminator(size=8).load_state_dict(HashingDiscriminator(size=16).state_dict())
    with pytest.raises(ValueError, match="other weights than the discriminator"):
        causal().load_state_dict({"weights": {}})
    with pytest.raises(ValueError, match="human_texts has no text with a word"):
        AdversarialReward(["", " "])
    with pytest.raises(TypeError, match="human_texts='.*' must be a list of texts"):
        AdversarialReward("the film")
    with pytest.raises(ValueError, match="output='odds'"):
        AdversarialReward(HUMAN, output="odds")
    with pytest.raises(ValueError, match="learning_rate=0 must be a finite number greater than 0"):
        CausalDiscriminator(tiny_causal_reward_model(), TOKENIZER, learning_rate=0)


# --- learning parts, wherever they stand


class Notes(LearningReward):
    """Writes down what it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, *, prompts, completions, **columns):
        return [float(len(self.seen))] * len(completions)

    def observe(self, *, prompts, completions, **columns):
        self.seen += list(zip(prompts, completions, columns.get("task", [None] * len(prompts)), strict=True))

    def metrics(self):
        return {"notes/seen": float(len(self.seen))}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = [tuple(row) for row in state["seen"]]


def test_every_learning_part_learns_once_inner_ones_first():
    notes = Notes()
    running = RunningNormalized(notes, warm_up=False)
    reward = 0.5 * running + (notes - 1).clip(-1, 1) * FunctionReward(count_liked)
    learned = learn_from(reward, prompts=["a", "b"], completions=["x", "y"])
    assert learned == [notes, running]
    assert notes.seen == [("a", "x", None), ("b", "y", None)]
    assert (running.count, running.mean) == (2, 2.0)  # it saw the scores of what notes had already learned
    assert learn_from(FunctionReward(count_liked), prompts=["a"], completions=["x"]) == []
    with pytest.raises(ValueError, match=r"one entry for each text, got .*'task': 1"):
        learn_from(reward, prompts=["a", "b"], completions=["x", "y"], columns={"task": [1]})


def test_a_part_behind_a_route_sees_that_routes_rows_only():
    first, second = Notes(), Notes()
    reward = Router("task", {"rhyme": first, "joke": second, "pun": second}, normalise=False)
    columns = {"task": ["joke", "rhyme", "pun"]}
    learn_from(reward, prompts=["a", "b", "c"], completions=["x", "y", "z"], columns=columns)
    assert first.seen == [("b", "y", "rhyme")]
    assert second.seen == [("a", "x", "joke"), ("c", "z", "pun")]


# --- in a training

ROWS = [{"prompt": prompt, "task": task} for prompt in PROMPTS for task in ("rhyme", "joke")]


@pytest.mark.parametrize("scoring", ["deferred", "instant"])
def test_the_episodes_that_ended_are_observed_with_their_columns(scoring):
    notes = Notes()
    env = tiny_vector_env(3, reward=notes + FunctionReward(count_liked), prompts=ROWS, max_new_tokens=5)
    ended = []

    class Watch(LearningRewards):
        def _on_step(self):
            # The rows as they are before each step, straight from the environment.
            for row, info in enumerate(self.locals["infos"]):
                if self.locals["dones"][row]:
                    ended.append((info["prompt"], self.before[row]))
            self.before = [row.columns["task"] for row in env._episodes.texts.prompts]
            return super()._on_step()

        def _on_rollout_start(self):
            self.before = [row.columns["task"] for row in env._episodes.texts.prompts]
            super()._on_rollout_start()

    model = tiny_ppo(env, n_steps=7, scoring=scoring)
    logs = logs_of_learning(model, 3 * 7 * 4, callback=Watch())
    assert len(ended) > 10
    assert [(prompt, task) for prompt, _, task in notes.seen] == ended
    assert values_of(logs, "notes/seen")[-1] == len(ended)


def test_single_environments_teach_their_shared_reward():
    notes = Notes()
    env = DummyVecEnv([lambda: Monitor(tiny_env(reward=notes, prompts=ROWS, max_new_tokens=4))] * 2)
    tiny_ppo(env, n_steps=8).learn(32, callback=LearningRewards())
    assert len(notes.seen) >= 6
    assert {task for _, _, task in notes.seen} <= {"rhyme", "joke"}
    apart = DummyVecEnv([lambda: Monitor(tiny_env(reward=Notes()))] * 2)
    with pytest.raises(ValueError, match="give all of them the same object"):
        tiny_ppo(apart, n_steps=8).learn(16, callback=LearningRewards())


def test_a_reward_that_learns_nothing_is_an_error():
    with pytest.raises(ValueError, match="'count_liked' has no part that learns"):
        tiny_ppo().learn(48, callback=LearningRewards())


def test_the_accuracy_is_logged_and_two_discriminators_have_two_names():
    reward = AdversarialReward(HUMAN) + 0.5 * AdversarialReward(HUMAN, seed=1)
    model = tiny_ppo(tiny_vector_env(4, reward=reward))
    logs = logs_of_learning(model, 48 * 3, callback=LearningRewards())
    assert len(values_of(logs, "adversarial/accuracy")) == 3
    assert all(0 <= value <= 1 for value in values_of(logs, "adversarial/accuracy_2"))


def everything(discriminator):
    """Learning parts of all kinds in one reward."""
    router = Router("task", {"rhyme": count_liked, "joke": AdversarialReward(HUMAN, discriminator())})
    return router + 0.3 * NoveltyReward(memory=20) + 0.2 * RunningNormalized(FunctionReward(count_liked))


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_resumed_training_is_the_one_that_was_not_stopped(name, tmp_path):
    def new_training():
        env = tiny_vector_env(4, reward=everything(DISCRIMINATORS[name]), prompts=ROWS)
        return tiny_ppo(env, learning_rate=3e-3)

    def log_of(model):
        log = Log()
        model.set_logger(Logger(None, [log]))
        return log

    whole = new_training()
    whole_log = log_of(whole)
    whole.learn(48 * 5, callback=[LearningRewards()])

    stopped = new_training()
    with pytest.raises(KeyboardInterrupt):
        stopped.learn(
            48 * 5, callback=[LearningRewards(), TrainingCheckpoints(tmp_path, every=48), StopAfter(48 * 3 + 20)]
        )
    resumed = new_training()
    resumed_log = log_of(resumed)
    callbacks = [LearningRewards(), TrainingCheckpoints(tmp_path, every=48), StopAfter(10**9)]
    resume(resumed, tmp_path, callback=callbacks)
    assert resumed.num_timesteps == 48 * 3
    resumed.learn(48 * 2, callback=callbacks, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    for (key, a), (_, b) in zip(whole.policy.state_dict().items(), resumed.policy.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert resumed_log.rows[-1]["adversarial/accuracy"] == whole_log.rows[-1]["adversarial/accuracy"]
    assert resumed_log.rows[-1]["rollout/ep_rew_mean"] == whole_log.rows[-1]["rollout/ep_rew_mean"]

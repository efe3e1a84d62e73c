"""Value-based agents: their targets and losses against plain computations, their fixed points against known optima."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_vector_env, values_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.agents.buffers.episode_replay import EpisodeReplay
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.agents.common.bellman_targets import bellman_targets
from textgym.agents.common.exploration import Exploration
from textgym.agents.q_learning import QLearning
from textgym.agents.sarsa import SARSA
from textgym.agents.soft_q_learning import SoftQLearning
from textgym.envs import TextGenVectorEnv
from textgym.language_model import LanguageModel

AGENTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "soft q": (SoftQLearning, {}),
    "soft q, one step": (SoftQLearning, {"td_lambda": 0.0, "batch_episodes": 12, "tau": 0.1}),
    "q": (QLearning, {}),
    "q, single": (QLearning, {"double": False, "epsilon": 0.2, "td_lambda": 0.9, "target_update_interval": 2}),
    "sarsa": (SARSA, {}),
    "sarsa, expected": (SARSA, {"expected": True, "td_lambda": 0.0, "batch_size": 30}),
}
every_agent = pytest.mark.parametrize("name", AGENTS)
REPLAYING = [name for name, (agent, _) in AGENTS.items() if agent is not SARSA]


def make_agent(name: str, env: Any = None, **arguments: Any) -> Any:
    agent, own = AGENTS[name]
    env = tiny_vector_env(8, kl_coef=0.05) if env is None else env
    arguments = {"learning_rate": 1e-2, "seed": 0, "device": "cpu", **own, **arguments}
    return agent("LanguageModelPolicy", env, **arguments)


def with_rollout(model: Any) -> Any:
    """The agent with a rollout that it has not learned from."""
    model.set_logger(Logger(None, []))
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@torch.no_grad()
def shift(policy: Any, scale: float = 0.05, seed: int = 1) -> None:
    """Change all weights a little."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


# --- every agent


@every_agent
def test_it_learns(name: str) -> None:
    options = {"q_temperature": 0.03} if name.startswith("sarsa") else {}
    model = make_agent(name, stats_window_size=24, **options)
    logs = logs_of_learning(model, 1600 if options else 1000, until=("rollout/score_mean", 0.45))
    scores = values_of(logs, "rollout/score_mean")
    assert scores[0] < 0.25
    assert scores[-1] > 0.4
    assert {"train/td_error", "train/q_mean", "train/target_mean", "train/value_mean"} <= set(logs[-1])


@every_agent
def test_it_is_saved_and_opened_again(name: str, tmp_path: Any) -> None:
    model = make_agent(name).learn(60)
    model.save(tmp_path / "agent.zip")
    model.save_pretrained(tmp_path / "files")
    environment = tiny_vector_env(8, kl_coef=0.05)
    loaded = type(model).load(tmp_path / "agent.zip", env=environment, trust=True)
    opened = type(model).from_pretrained(tmp_path / "files", env=tiny_vector_env(8, kl_coef=0.05), device="cpu")
    texts = model.policy.generate(["the film is"], deterministic=True)
    for other in (loaded, opened):
        assert other.policy.generate(["the film is"], deterministic=True) == texts
        for argument, value in AGENTS[name][1].items():
            assert getattr(other, argument) == value, argument
    if name in REPLAYING:
        for ours, theirs in zip(loaded.target.parameters(), model.target.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        for ours, theirs in zip(opened.target.parameters(), model.policy.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert len(loaded.replay) == len(opened.replay) == 0
    loaded.learn(50, reset_num_timesteps=False)
    opened.learn(50, reset_num_timesteps=False)
    type(model).load(tmp_path / "agent.zip", trust=True)  # to predict, without an environment


@every_agent
def test_a_resumed_run_ends_with_the_same_weights(name: str, tmp_path: Any) -> None:
    options: dict[str, Any] = {"replay_episodes": 20} if name in REPLAYING else {}  # some have made room by then
    if name == "q, single":
        options["explore_with"] = "reference"
    whole = make_agent(name, **options)
    whole.learn(300)
    first = make_agent(name, **options)
    first.learn(130, callback=TrainingCheckpoints(tmp_path, every=50))
    second = make_agent(name, **options)
    checkpoints = TrainingCheckpoints(tmp_path, every=50)
    resume(second, tmp_path, [checkpoints])
    assert 0 < second.num_timesteps <= first.num_timesteps
    second.learn(300 - second.num_timesteps, reset_num_timesteps=False, callback=checkpoints)
    assert second.num_timesteps == whole.num_timesteps
    for ours, theirs in zip(second.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- targets


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_targets_without_a_toll_are_the_lambda_returns_of_stable_baselines(lam: float) -> None:
    model = with_rollout(make_agent("sarsa"))
    buffer = model.rollout_buffer
    buffer.values[:] = np.random.default_rng(0).normal(size=buffer.values.shape)
    buffer.values[~buffer.active] = 0.0
    buffer.gamma, buffer.gae_lambda = 0.9, lam
    buffer.compute_returns_and_advantage(torch.zeros(8), np.ones(8))
    batch = buffer.samples(buffer.segments)
    targets = bellman_targets(batch.rewards, batch.old_values, batch.rows, 0.9, lam)
    torch.testing.assert_close(targets, batch.returns, rtol=1e-5, atol=1e-6)


def test_the_replay_keeps_the_newest_episodes_as_they_were() -> None:
    model = make_agent("q", env=tiny_vector_env(8, kl_coef=0.05, action_masking=True), replay_episodes=11)
    kept = KeepRollouts()
    model.learn(100, callback=kept)
    assert len(kept.episodes) > 1
    assert len(model.replay) == 11
    copy = EpisodeReplay(11, model.observation_space, model.action_space)
    copy.load_state_dict(model.replay.state_dict())
    batch, again = model.replay._samples(list(model.replay._episodes)), copy._samples(list(copy._episodes))
    for ours, theirs in zip(batch, again, strict=True):
        if ours is not None:
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    buffer = model.rollout_buffer
    last = buffer.samples(sorted(buffer.segments, key=lambda segment: segment.episode))
    newest = batch.rows >= 3  # the last 8 of 11
    np.testing.assert_array_equal(batch.actions[newest], last.actions)
    np.testing.assert_array_equal(batch.action_masks[newest], last.action_masks)
    np.testing.assert_array_equal(batch.ref_log_prob[newest], last.ref_log_prob)
    for row, episode in enumerate(kept.episodes[-1]):
        assert model.env.text_env is not None
        assert np.isfinite(episode["kl"]), row
    sampled = model.replay.sample(5)
    assert len(sampled.episodes) == 5
    assert len(model.replay.sample(50).episodes) == 11


# --- losses, from forwards over one prefix at a time


class Scaled(torch.autograd.Function):
    """The same, with another gradient."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.scale * gradient, None


def plain_states(
    model: Any, batch: Any, policy: Any, value_gradient: float = 1.0
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each episode and token, the log-distribution and the value, each from a forward of its own."""
    episodes: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in batch.lengths]
    for row, position in zip(batch.rows, batch.positions, strict=True):
        ids = torch.as_tensor(batch.input_ids[row, : position + 1])[None]
        out = policy.transformer(input_ids=ids, output_hidden_states=True)
        hidden = out.hidden_states[-1][0, -1]
        if hidden.requires_grad:
            value = policy.value_net(Scaled.apply(hidden, value_gradient))[0]
        else:
            value = policy.value_net(hidden)[0]
        episodes[row].append((out.logits[0, -1].log_softmax(-1), value))
    return episodes


def plain_reference(batch: Any) -> list[list[torch.Tensor]]:
    reference = tiny_language_model().model
    episodes: list[list[torch.Tensor]] = [[] for _ in batch.lengths]
    for row, position in zip(batch.rows, batch.positions, strict=True):
        with torch.no_grad():
            logits = reference(torch.as_tensor(batch.input_ids[row, : position + 1])[None]).logits
        episodes[row].append(logits[0, -1].log_softmax(-1))
    return episodes


def by_episode(values: torch.Tensor, rows: np.ndarray) -> list[list[float]]:
    return [values[rows == row].tolist() for row in range(int(rows.max()) + 1)]


def prepared(name: str, **arguments: Any) -> tuple[Any, Any]:
    """An agent with a rollout, whose weights and lagging copy have moved on since, and a minibatch."""
    model = with_rollout(make_agent(name, env=tiny_vector_env(4, kl_coef=0.3, max_new_tokens=5), **arguments))
    shift(model.policy)
    if name in REPLAYING:
        shift(model.target, 0.01, seed=2)
        return model, model.replay.sample(4)
    return model, next(model.rollout_buffer.get())


def unpenalised(model: Any) -> list[float]:
    """Φ's differences of the rollout's episodes, from their texts alone."""
    reward = model.env.text_env.reward
    return sorted(
        float(reward(prompts=[e["prompt"]], completions=[e["completion"]])[0]) for e in model.finished_episodes
    )


def assert_same_gradients(model: Any, ours: torch.Tensor, plain: torch.Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.policy.parameters() if p.requires_grad]
    for one, two in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scoring", ["deferred", "instant"])
def test_the_loss_of_soft_q_learning_is_the_papers(lam: float, scoring: str) -> None:
    beta, gamma = 0.3, 0.9
    model, batch = prepared("soft q", gamma=gamma, td_lambda=lam, scoring=scoring)
    rewards, actions = by_episode(batch.rewards, batch.rows), by_episode(batch.actions, batch.rows)
    np.testing.assert_allclose(sorted(map(sum, rewards)), unpenalised(model), atol=1e-5)
    with torch.no_grad():
        lagging = plain_states(model, batch, model.target)
    references = plain_reference(batch)
    errors = []
    for episode, states in enumerate(plain_states(model, batch, model.policy)):
        n = len(states)
        for t, (log_probs, value) in enumerate(states):
            a = actions[episode][t]
            q = value + beta * (log_probs[a] - references[episode][t][a])
            # The n-step targets of Guo et al., equation 11, and their mean with weights (1 − λ) λⁿ⁻¹.
            steps = []
            for k in range(1, n - t + 1):
                target = sum(gamma**i * rewards[episode][t + i] for i in range(k))
                for i in range(1, k):
                    b = actions[episode][t + i]
                    gap = lagging[episode][t + i][0][b] - references[episode][t + i][b]
                    target = target - gamma**i * beta * gap
                steps.append(target + (gamma**k * lagging[episode][t + k][1] if t + k < n else 0.0))
            weights = [(1 - lam) * lam**k for k in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
            errors.append(q - sum(w * s for w, s in zip(weights, steps, strict=True)))
    assert_same_gradients(model, model.loss(batch).value, 0.5 * torch.stack(errors).square().mean())


def test_soft_values_are_log_sums_over_the_reference() -> None:
    model, batch = prepared("soft q")
    beta = model.kl_coef
    states, references = plain_states(model, batch, model.policy), plain_reference(batch)
    for episode, reference in zip(states, references, strict=True):
        for (log_probs, value), ref in zip(episode, reference, strict=True):
            q = value + beta * (log_probs - ref)
            torch.testing.assert_close(beta * (q / beta + ref).logsumexp(-1), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.8])
def test_the_loss_of_q_learning_is_watkinss(double: bool, lam: float) -> None:
    alpha, beta, gamma = 0.2, 0.3, 0.9
    model, batch = prepared("q", epsilon=0.5, q_temperature=alpha, gamma=gamma, td_lambda=lam, double=double)
    rewards, actions = by_episode(batch.rewards, batch.rows), by_episode(batch.actions, batch.rows)
    with torch.no_grad():
        lagging = plain_states(model, batch, model.target)
    references = plain_reference(batch)
    errors, went_on = [], 0
    for episode, states in enumerate(plain_states(model, batch, model.policy)):
        y = 0.0
        for t in reversed(range(len(states))):
            if t + 1 < len(states):
                best = int((states if double else lagging[episode])[t + 1][0].argmax())
                log_probs, value = lagging[episode][t + 1]
                following = value + alpha * log_probs[best]
                if actions[episode][t + 1] == best:
                    went_on += 1
                    following = (1 - lam) * following + lam * y
            else:
                following = 0.0
            a = actions[episode][t]
            paid = rewards[episode][t] + beta * references[episode][t][a]  # of who takes the token for sure
            y = paid + gamma * following
            errors.append(states[t][1] + alpha * states[t][0][a] - y)
    assert 0 < went_on < len(errors)
    assert_same_gradients(model, model.loss(batch).value, 0.5 * torch.stack(errors).square().mean())


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.8])
def test_the_loss_of_sarsa_is_the_textbooks(expected: bool, lam: float) -> None:
    alpha, gamma = 0.2, 0.9
    model, batch = prepared("sarsa", q_temperature=alpha, gamma=gamma, td_lambda=lam, expected=expected)
    rewards, actions = by_episode(batch.rewards, batch.rows), by_episode(batch.actions, batch.rows)
    errors = []
    for episode, states in enumerate(plain_states(model, batch, model.policy, alpha)):
        qs = [value + alpha * log_probs for log_probs, value in states]  # (V,) each
        y = 0.0
        for t in reversed(range(len(states))):
            following = 0.0
            if t + 1 < len(states):
                mean = (states[t + 1][0].exp() * qs[t + 1]).sum()
                ahead = mean if expected else qs[t + 1][actions[episode][t + 1]]
                following = (1 - lam) * ahead.item() + lam * y
            y = rewards[episode][t] + gamma * following
            errors.append(qs[t][actions[episode][t]] - y)
    assert_same_gradients(model, model.loss(batch).value, 0.5 * torch.stack(errors).square().mean())


# --- a task whose optimum is known

LETTERS = "abcd"
SMALL = ("<pad>", "<bos>", "<eos>", "<unk>", *LETTERS)
LENGTH = 2


def small_language_model() -> LanguageModel:
    """Five tokens that may follow: four letters and the end."""
    words = Tokenizer(WordLevel({token: i for i, token in enumerate(SMALL)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(SMALL),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    return LanguageModel(model, tokenizer)


ALLOWED = [2, 4, 5, 6, 7]  # the end and the letters
RETURNS = dict(
    zip(
        ("".join(text) for n in range(LENGTH + 1) for text in itertools.product(LETTERS, repeat=n)),
        np.random.default_rng(3).random(21).round(2).tolist(),
        strict=True,
    )
)


def table(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [RETURNS[text.replace(" ", "")] for text in completions]


def small_env(beta: float) -> TextGenVectorEnv:
    return TextGenVectorEnv(
        16,
        language_model=small_language_model(),
        prompts=["?"],  # <unk>: after a letter, as a prompt, the same letter again would change nothing
        reward=table,
        max_new_tokens=LENGTH,
        action_masking=True,
        kl_coef=beta,
        device="cpu",
    )


def log_policy(model: Any) -> Callable[[str], np.ndarray]:
    """Log-probabilities of the allowed tokens after what was written, from a plain forward."""

    def of(text: str) -> np.ndarray:
        ids = [3, *(SMALL.index(letter) for letter in text)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1][ALLOWED]
        return np.asarray(logits.double().log_softmax(-1))

    return of


def solve(text: str, backup: Callable[[np.ndarray, str], tuple[float, np.ndarray]]) -> dict[str, tuple[float, Any]]:
    """Value and policy of every state from ``text`` on, from the ends backwards.

    :param backup: of rewards plus what follows, ``(5,)``, and the state: its value and policy
    """
    solution: dict[str, tuple[float, Any]] = {}
    totals = [0.0]  # the end pays nothing more: Φ of the text is paid already
    for letter in LETTERS:
        longer = text + letter
        following = 0.0
        if len(longer) < LENGTH:
            solution |= solve(longer, backup)
            following = solution[longer][0]
        totals.append(RETURNS[longer] - RETURNS[text] + following)
    solution[text] = backup(np.array(totals), text)
    return solution


def trained(agent: type[Any], beta: float, timesteps: int, **arguments: Any) -> Any:
    arguments = {"learning_rate": lambda left: 1e-2 * left, "seed": 0, "device": "cpu", **arguments}
    return agent("LanguageModelPolicy", small_env(beta), **arguments).learn(timesteps)


def value_of(model: Any, text: str) -> float:
    ids = torch.tensor([[3, *(SMALL.index(letter) for letter in text)]])
    with torch.no_grad():
        out = model.policy.transformer(ids, output_hidden_states=True)
        return float(model.policy.value_net(out.hidden_states[-1][0, -1]))


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_soft_q_learning_ends_at_the_kl_regularised_optimum(lam: float) -> None:
    beta = 0.2
    model = trained(SoftQLearning, beta, 1500, td_lambda=lam)
    reference, policy = log_policy(small_language_model().model), log_policy(model.policy.transformer)
    # π*(y) ∝ π_ref(y) exp(R(y) / β), over whole texts.
    texts = [(text, end) for text in RETURNS for end in ([True] if len(text) < LENGTH else [False])]

    def log_prob(of: Callable[[str], np.ndarray], text: str, end: bool) -> float:
        total = sum(of(text[:i])[1 + LETTERS.index(letter)] for i, letter in enumerate(text))
        return float(total + (of(text)[0] if end else 0.0))

    ours = np.exp([log_prob(policy, *text) for text in texts])
    before = np.exp([log_prob(reference, *text) for text in texts])
    best = before * np.exp([RETURNS[text] / beta for text, _ in texts])
    value = beta * np.log(best.sum()) - RETURNS[""]
    best = best / best.sum()
    assert ours.sum() == pytest.approx(1.0, abs=1e-5)
    assert 0.5 * np.abs(before - best).sum() > 0.3
    assert 0.5 * np.abs(ours - best).sum() < 0.03
    assert value_of(model, "") == pytest.approx(value, abs=0.02)


def test_q_learning_finds_the_best_text() -> None:
    beta = 0.05
    reference = log_policy(small_language_model().model)

    def backup(totals: np.ndarray, text: str) -> tuple[float, np.ndarray]:
        totals = totals + beta * reference(text)
        return float(totals.max()), totals

    solution = solve("", backup)
    model = trained(QLearning, beta, 1500, q_temperature=0.1, epsilon=0.5, explore_with="uniform")
    policy = log_policy(model.policy.transformer)
    for text, (_, q) in solution.items():
        ours = value_of(model, text) + 0.1 * policy(text)
        assert ours.argmax() == q.argmax()
        assert ours.max() == pytest.approx(q.max(), abs=0.08)
        assert np.abs(ours - q).mean() < 0.1


def test_sarsa_ends_where_its_policy_is_that_of_its_own_values() -> None:
    alpha, beta = 0.1, 0.1
    reference = log_policy(small_language_model().model)

    def backup(totals: np.ndarray, text: str) -> tuple[float, np.ndarray]:
        logits = (totals + beta * reference(text)) / (alpha + beta)
        log_probs = logits - np.log(np.exp(logits).sum())
        return float(np.exp(log_probs) @ (totals - beta * (log_probs - reference(text)))), log_probs

    solution = solve("", backup)
    model = trained(SARSA, beta, 7500, q_temperature=alpha, td_lambda=0.0, expected=True, batch_size=8)
    policy = log_policy(model.policy.transformer)
    for text, (_, log_probs) in solution.items():
        if text == "" or solution[""][1][1 + LETTERS.index(text)] > np.log(0.15):
            assert 0.5 * np.abs(np.exp(policy(text)) - np.exp(log_probs)).sum() < 0.1
    assert 0.5 * np.abs(np.exp(reference("")) - np.exp(solution[""][1])).sum() > 0.25


# --- exploration and what it does to log-probs


@pytest.mark.parametrize("explore_with", ["policy", "reference", "uniform"])
def test_the_environment_is_told_the_probability_of_the_mixture(explore_with: str) -> None:
    epsilon = 0.6
    env = tiny_vector_env(8, kl_coef=0.05, action_masking=True)
    model = make_agent("q", env=env, epsilon=epsilon, explore_with=explore_with)
    shift(model.policy)
    with_rollout(model)
    batch = model.rollout_buffer.samples(model.rollout_buffer.segments)
    reference = tiny_language_model().model
    greedy = 0
    for i, (row, position) in enumerate(zip(batch.rows, batch.positions, strict=True)):
        ids = torch.as_tensor(batch.input_ids[row, : position + 1])[None]
        mask = batch.action_masks[i]
        with torch.no_grad():
            own = model.policy.transformer(ids).logits[0, -1].masked_fill(~mask, -torch.inf).softmax(-1)
            other = reference(ids).logits[0, -1].masked_fill(~mask, -torch.inf).softmax(-1)
        explored = {"policy": own, "reference": other, "uniform": mask / mask.sum()}[explore_with]
        token = int(batch.actions[i])
        expected = epsilon * explored[token] + (1 - epsilon) * (token == own.argmax())
        greedy += token == int(own.argmax())
        assert float(batch.old_log_prob[i]) == pytest.approx(float(expected.log()), abs=1e-4)
    assert 0.4 * 0.6 < greedy / len(batch.rows) < 0.95


def test_without_exploration_the_text_is_the_greedy_one() -> None:
    model = with_rollout(make_agent("q", epsilon=0.0))
    texts = {episode["prompt"]: episode["completion"] for episode in model.finished_episodes}
    prompts = sorted(texts)
    assert model.policy.generate(prompts, max_new_tokens=8, deterministic=True) == [texts[p] for p in prompts]
    assert np.abs(model.rollout_buffer.log_probs).max() == 0.0


def test_exploration_follows_its_schedule() -> None:
    model = make_agent("q", epsilon=lambda left: 0.5 * left)
    rates = values_of(logs_of_learning(model, 200), "rollout/exploration_rate")
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[0] < 0.5
    model.epsilon = lambda left: 2.0
    with pytest.raises(ValueError, match=r"epsilon=2\.0 must be a finite number"):
        model.learn(50)


def test_q_learning_has_its_own_exploration_and_no_other() -> None:
    with pytest.raises(TypeError, match="exploration"):
        make_agent("q", exploration=Exploration(temperature=2.0))


# --- the lagging copy


def test_the_lagging_copy_follows_at_its_pace() -> None:
    model = make_agent("soft q", tau=0.25, target_update_interval=2)
    start = [p.clone() for p in model.policy.parameters()]
    assert model.target.optimizer is None
    model.learn(1)
    for parameter, old in zip(model.target.parameters(), start, strict=True):
        torch.testing.assert_close(parameter, old, rtol=0, atol=0)
    model.learn(1, reset_num_timesteps=False)
    moved = 0.0
    for parameter, old, new in zip(model.target.parameters(), start, model.policy.parameters(), strict=True):
        torch.testing.assert_close(parameter, 0.75 * old + 0.25 * new)
        moved += float((parameter - old).detach().abs().sum())
    assert moved > 0


def test_with_an_adapter_the_lagging_copy_shares_the_weights() -> None:
    model = make_agent("soft q", policy_kwargs={"lora": {"r": 2}})
    model.learn(100)
    shared = {p.data_ptr() for p in model.policy.parameters() if not p.requires_grad}
    own = {p.data_ptr() for p in model.target.parameters()}
    learning = {p.data_ptr() for p in model.policy.parameters() if p.requires_grad}
    assert shared
    assert learning
    assert shared < own
    assert not learning & own


# --- what is refused


@pytest.mark.parametrize(
    ("agent", "arguments", "message"),
    [
        (SoftQLearning, {"env": "kl_coef=0"}, r"kl_coef=0\.0 of the environment must be greater than 0"),
        (SoftQLearning, {"td_lambda": 1.5}, r"td_lambda=1\.5"),
        (SoftQLearning, {"tau": 0.0}, r"tau=0\.0"),
        (SoftQLearning, {"replay_episodes": 0}, "replay_episodes=0"),
        (SoftQLearning, {"gradient_steps": 0}, "gradient_steps=0"),
        (SoftQLearning, {"batch_episodes": 2.5}, r"batch_episodes=2\.5"),
        (SoftQLearning, {"target_update_interval": 0}, "target_update_interval=0"),
        (QLearning, {"epsilon": 1.5}, r"epsilon=1\.5"),
        (QLearning, {"explore_with": "luck"}, "explore_with='luck' must be one of 'policy', 'reference', 'uniform'"),
        (QLearning, {"q_temperature": 0.0}, r"q_temperature=0\.0"),
        (QLearning, {"double": "yes"}, "double='yes'"),
        (SARSA, {"expected": 3}, "expected=3"),
        (SARSA, {"td_lambda": -0.1}, r"td_lambda=-0\.1"),
    ],
)
def test_impossible_hyperparameters_are_named(agent: type[Any], arguments: dict[str, Any], message: str) -> None:
    arguments = dict(arguments)
    env = tiny_vector_env(kl_coef=0.0 if arguments.pop("env", None) else 0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        agent("LanguageModelPolicy", env, device="cpu", **arguments)


def test_q_learning_does_without_a_reference() -> None:
    model = with_rollout(make_agent("q", env=tiny_vector_env(4, kl_coef=0.0)))
    assert model.replay.sample(4).ref_log_prob is None
    model.train()

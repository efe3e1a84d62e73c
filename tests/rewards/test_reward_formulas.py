"""Rewards by name: formulas, files, modules, and what is neither."""

from __future__ import annotations

import shutil
import sys

import pytest
from typer.testing import CliRunner

from textgym.embedded import REWARD_MODEL
from textgym.rewards import Reward, as_reward
from textgym.rewards.code_names import code_in
from textgym.rewards.expressions import parse_reward, reaches_out, reward_named, reward_names
from textgym.rewards.opening import load_reward

PROMPTS = ["take", "the film"]
COMPLETIONS = [" an umbrella. An umbrella.", " is good"]


def scores(reward: Reward, **columns):
    return reward(prompts=PROMPTS, completions=COMPLETIONS, **columns)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """The search path, put back afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_formula_is_what_the_same_words_mean_in_python():
    from textgym.rewards import Grammar, KeywordPresence, LengthTarget, Repetition

    formula = "0.5*keywords(['umbrella', 'rain']) - 2 * Repetition(n=2).clip(-0.1, 0) / 4 + -grammar"
    formula += " + length_target(3, unit='words')"
    meant = 0.5 * KeywordPresence(["umbrella", "rain"]) - 2 * Repetition(n=2).clip(-0.1, 0) / 4
    meant = meant + -Grammar() + LengthTarget(3, unit="words")
    assert scores(as_reward(formula)) == scores(meant)
    assert len(set(scores(meant))) == 2
    assert scores(as_reward("grammar.normalized(mean=0.5, std=2)")) == scores(Grammar().normalized(0.5, 2))


def test_rewards_can_be_arguments_of_rewards():
    routed = parse_reward("router('user', {'a': keywords(['good']), 'b': 2*keywords(['good'])}, normalise=False)")
    assert routed(prompts=["p", "p"], completions=["good", "good"], user=["a", "b"]) == [1.0, 2.0]
    ensemble = parse_reward("ensemble([keywords(['good']), keywords(['bad'])], 'mean')")
    assert ensemble(prompts=["p"], completions=["good"]) == [0.5]


@pytest.mark.parametrize(
    ("formula", "columns"),
    [
        ("ensemble(['{path}', '{path}'], 'mean')", {}),
        ("router('user', {{'a': '{path}'}}, default='{path}', normalise=False)", {"user": ["a", "b"]}),
        ("running_normalized('{path}', warm_up=False)", {}),
        ("length_debiased('{path}', slope=0.0)", {}),
        ("predicted_difference('{path}', 'wanted', ' ')", {"wanted": PROMPTS}),
    ],
)
def test_a_formula_opens_the_directories_that_rewards_are_made_of(formula, columns, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(REWARD_MODEL, path)
    found = scores(parse_reward(formula.format(path=path)), **columns)
    if "wanted" in columns:
        expected = as_reward(path)(prompts=[f"{text} " for text in PROMPTS], completions=COMPLETIONS)
    else:
        expected = scores(as_reward(path))
    assert found == pytest.approx(expected, abs=1e-5)


def test_embedded_is_the_reward_model_that_ships():
    assert scores(as_reward("2*embedded")) == pytest.approx([2 * x for x in scores(as_reward(None))])
    assert scores(as_reward("embedded")) == scores(as_reward(None))


def test_every_name_stands_for_a_reward_and_makes_it_or_says_which_argument_is_missing():
    for name, kind in reward_names().items():
        try:
            reward = parse_reward(name)
        except ValueError as error:
            assert "arguments (" in str(error) or "is refused" in str(error), name  # noqa: PT017
        except ModuleNotFoundError:
            continue
        else:
            assert type(reward).__name__ == kind


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gramar", "there is no reward 'gramar' and no directory of that name; near are grammar"),
        ("0.5*coherense + grammar", "there is no reward 'coherense'; near are coherence"),
        ("length", r"length does not fit its arguments \(target, unit='tokens', tolerance=0.0\): missing"),
        ("repetition(words=2)", "unexpected keyword argument 'words'"),
        ("keywords()", r"keywords\(\) is refused: give keywords= or column="),
        ("grammar.potentials(1)", "has the method 'potentials'; there are clip and normalized"),
        ("grammar.__class__", "is not part of a formula"),
        ("__import__('os')", "there is no reward '__import__'"),
        ("(lambda: 1)()", "is not a call of a reward's name"),
        ("[grammar for x in [1]]", "is not part of a formula"),
        ("grammar**2", "is not part of a formula"),
        ("grammar/0", "can't be computed|is refused|must be"),
        ("1 + 1", "is 2, expected a reward"),
        ("[grammar]", "expected a reward"),
        ("keywords(*['a'])", r"has \* or \*\* among its arguments"),
        ("0.5 coherence", "can't be read: invalid syntax at character 5"),
        ("", "can't be read"),
        ("(" * 3000 + "grammar" + ")" * 3000, "nested|can't be read"),
        ("grammar" + " + grammar" * 2000, "characters; at most"),
    ],
)
def test_what_is_not_a_formula_is_refused_with_what_would_be(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        as_reward(text)


def test_a_directory_that_is_missing_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("runs/mine", "./mine", "/nowhere/mine"):
        with pytest.raises(FileNotFoundError, match="there is no"):
            as_reward(text)


def test_a_formula_takes_functions_of_files_and_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def length(completions): return [float(len(text)) for text in completions]\n")
    lengths = [float(len(text)) for text in COMPLETIONS]
    assert scores(load_reward("mine.py:length")) == lengths
    assert scores(load_reward("mine:length")) == lengths  # a module in the current folder
    assert scores(load_reward(f"0.5*{tmp_path}/mine.py:length + 1*./mine.py:length")) == [1.5 * x for x in lengths]
    with pytest.raises(ValueError, match="is Python code: import it"):
        reward_named("mine.py:length")


def test_a_reward_file_finds_what_lies_beside_it(tmp_path):
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "helper_of_mine.py").write_text("SCALE = 3.0\n")
    (folder / "late_helper_of_mine.py").write_text("SHIFT = 1.0\n")
    (folder / "mine.py").write_text(
        "from helper_of_mine import SCALE\n"
        "def score(completions):\n"
        "    from late_helper_of_mine import SHIFT\n"
        "    return [SCALE + SHIFT for _ in completions]\n"
    )
    assert scores(load_reward(f"{folder}/mine.py:score")) == [4.0, 4.0]


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for i in (1, 2):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "mine.py").write_text(f"def score(completions): return [{i}.0 for _ in completions]\n")
    assert scores(load_reward(f"{tmp_path}/1/mine.py:score - {tmp_path}/2/mine.py:score")) == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("code", "name", "complaint"),
    [
        ("x = 1\n\n1 / 0\n", "score", r"mine.py can't be imported; .*mine.py, line 3: ZeroDivisionError"),
        ("def score(:\n", "score", r"mine.py can't be imported; .*mine.py, line 1: "),
        ("import no_such_helper\n", "score", r"line 1: ModuleNotFoundError: No module named 'no_such_helper'"),
        ("x = 1\n", "score", "mine.py has nothing named 'score'"),
        ("score = 3\n", "score", "score in .*mine.py can't be used: reward must be a callable"),
        ("class Mine:\n    def __init__(self, scale): ...\n", "Mine", "is the class Mine, which needs arguments"),
    ],
)
def test_what_fails_in_a_reward_file_is_named_with_its_line(tmp_path, code, name, complaint):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=complaint):
        load_reward(f"{tmp_path}/mine.py:{name}")


def test_a_class_that_needs_no_arguments_is_made(tmp_path):
    assert scores(load_reward("textgym.rewards:Grammar")) == scores(as_reward("grammar"))
    with pytest.raises(ValueError, match="needs arguments"):
        load_reward("textgym.rewards:LengthTarget")


def test_a_missing_file_or_module_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no file gone.py"):
        load_reward("gone.py:score")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        load_reward("no_such_module:score")


@pytest.mark.parametrize(
    ("text", "code", "reaching"),
    [
        ("embedded", [], False),
        ("0.5*coherence + grammar", [], False),
        ("router('user', {'a:b': grammar, 'c d':grammar})", [], False),
        ("mine.py:score", ["mine.py:score"], False),
        ("0.5*grammar + module:thing - 2 * ./a/mine.py:score", ["module:thing", "./a/mine.py:score"], False),
        ("remote('http://gpu-box:8700/get_reward')", [], True),
        ("0.5*HumanReward('answers.sqlite') + grammar", [], True),
        ("organisation/model", [], False),
    ],
)
def test_what_runs_code_or_reaches_out_is_known_before_it_is_loaded(text, code, reaching):
    assert (code_in(text), reaches_out(text)) == (code, reaching)


def test_the_command_lists_the_rewards():
    from textgym.agents.cli.main import app

    result = CliRunner().invoke(app, ["rewards"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "keywords(keywords=None, column=None, whole_words=True)" in words
    assert "grammar(rules=None)" in words

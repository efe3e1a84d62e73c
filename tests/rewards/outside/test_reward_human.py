"""A person as the reward: asking through a real terminal, remembering, replaying, exporting, and losing nothing."""

from __future__ import annotations

import io
import json
import os
import pty
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
from prefix_batches import all_lengths, text_batch
from tiny_models import tiny_tokenizer

from textgym.rewards import AnswerStore, AnswerStoreError, FunctionReward, HumanReward, RewardError, TerminalAsker

TOKENIZER = tiny_tokenizer()
STRANGE = ["", "\x00", "\ud800 lone", "\U0001f600", "\u05e9\u05dc\u05d5\u05dd", "x" * 10_000, "\ud83d\ude00"]


class Script:
    """Answers from a list, and what was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def _next(self):
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def score(self, prompt, completion):
        self.asked.append((prompt, completion))
        return self._next()

    def compare(self, prompt, first, second):
        self.asked.append((prompt, first, second))
        answer = self._next()
        # The order shown is the reward's affair: a script names the text that it prefers.
        return {first: "first", second: "second"}.get(answer, answer)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "people" / "answers.sqlite"


def score(reward, *completions, prompt="the film is"):
    return reward(prompts=[prompt] * len(completions), completions=list(completions))


class Terminal:
    """A pseudo-terminal: a person types at one end, the reward reads and writes the other."""

    def __enter__(self):
        self.person, terminal = pty.openpty()
        self.input = os.fdopen(terminal, "r", encoding="utf-8", closefd=False)
        self.output = os.fdopen(os.dup(terminal), "w", encoding="utf-8")
        self.terminal = terminal
        assert self.input.isatty()
        assert self.output.isatty()
        return self

    def types(self, text):
        os.write(self.person, text.encode())

    def shown(self):
        return os.read(self.person, 1 << 16).decode()

    def __exit__(self, *error):
        self.input.close()
        self.output.close()
        os.close(self.terminal)
        os.close(self.person)


# --- asking in a terminal


def test_a_person_scores_at_a_terminal_until_the_answer_makes_sense(path):
    with Terminal() as terminal:
        reward = HumanReward(path, TerminalAsker(0, 10, terminal.input, terminal.output))
        terminal.types("good\n11\n7.5\n")
        assert score(reward, " warm") == [7.5]
        shown = terminal.shown()
        assert "the film is[ warm]" in shown
        assert "Score from 0 to 10" in shown
        assert "'good' is not a number" in shown
        assert "11 is not between 0 and 10" in shown
    assert AnswerStore(path).score("the film is", " warm") == 7.5


def test_a_person_compares_at_a_terminal(path):
    with Terminal() as terminal:
        reward = HumanReward(path, TerminalAsker(input=terminal.input, output=terminal.output), mode="compare")
        terminal.types("c\nA\n")
        first, second = score(reward, " warm", " dull")
        shown = terminal.shown()
    assert first is None  # there was nothing to compare it with yet
    a = shown.partition("a: [")[2].partition("]")[0]
    assert second == (1.0 if a == " dull" else -1.0)
    assert "'c' is none of them" in shown
    assert {a, shown.partition("b: [")[2].partition("]")[0]} == {" warm", " dull"}


def test_an_empty_line_skips_and_the_end_of_the_input_ends_the_questions(path):
    with Terminal() as terminal:
        reward = HumanReward(
            path, TerminalAsker(input=terminal.input, output=terminal.output), fallback=lambda **_: [0.25]
        )
        terminal.types("\n")
        assert score(reward, " warm") == [0.25]
        terminal.types("\x04")  # Ctrl-D
        with pytest.warns(UserWarning, match="the input has ended, so nobody is asked any more"):
            assert score(reward, " dull") == [0.25]
        assert score(reward, " fine") == [0.25]  # without a question: nothing was typed
    assert AnswerStore(path).counts() == {"scores": 0, "comparisons": 0}


def test_what_a_policy_writes_cannot_drive_the_terminal(path):
    with Terminal() as terminal:
        reward = HumanReward(path, TerminalAsker(input=terminal.input, output=terminal.output))
        terminal.types("0\n")
        score(reward, "\x1b[2J\ud800\u202egnp.exe\x00")
        shown = terminal.shown()
    assert "\x1b" not in shown
    assert r"\x1b[2J\ud800\u202egnp.exe\x00" in shown


def test_a_terminal_that_lacks_letters_shows_escapes():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(EOFError):
        TerminalAsker(input=io.StringIO(), output=output).score("caf\xe9", "")
    assert rb"caf\xe9[]" in output.buffer.getvalue()


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match=r"low=1.0 must be less than high=1.0"):
        TerminalAsker(1.0, 1.0)


# --- remembering and replaying


def test_a_text_is_asked_about_once_in_any_run(path):
    ask = Script(1.0, -0.5)
    reward = HumanReward(path, ask)
    assert score(reward, " warm", " dull", " warm") == [1.0, -0.5, 1.0]
    assert score(reward, " dull", " warm") == [-0.5, 1.0]
    assert ask.asked == [("the film is", " warm"), ("the film is", " dull")]
    assert score(HumanReward(path, Script()), " dull") == [-0.5]
    assert score(HumanReward(path), " dull", " new") == [-0.5, None]


def test_scores_of_several_people_are_averaged(path):
    store = AnswerStore(path)
    for value in (1.0, 0.5, 0.0):
        store.add_score("p", "x", value)
    assert HumanReward(store)(prompts=["p"], completions=["x"]) == [0.5]


def test_comparisons_count_wins_minus_defeats(path):
    ask = Script(" b", "tie", " d", None)
    reward = HumanReward(path, ask, mode="compare", fallback=lambda completions: [9.0] * len(completions))
    assert score(reward, " a") == [9.0]
    assert score(reward, " b") == [1.0]
    assert score(reward, " a", " b") == [-1.0, 1.0]
    assert score(reward, " c") == [0.0]  # the tie, with " b"
    assert score(reward, " b") == [0.5]  # one win and one tie
    assert score(reward, " d") == [1.0]
    assert score(reward, " e") == [9.0]  # skipped
    assert score(reward, " e") == [9.0]  # and not asked again
    assert score(reward, " z", prompt="another") == [9.0]


def test_strange_texts_are_remembered_exactly(path, tmp_path):
    store = AnswerStore(path)
    for i, text in enumerate(STRANGE):
        store.add_score(text, text, float(i))
        store.add_comparison("p", text, "other")
    again = AnswerStore(path)
    assert again.scores([(text, text) for text in STRANGE]) == list(map(float, range(len(STRANGE))))
    assert again.preferences([("p", text) for text in STRANGE]) == [1.0] * len(STRANGE)
    assert store.export_preferences(tmp_path / "p.jsonl") == len(STRANGE)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    # JSON can't tell a pair of lone surrogates from the character that they would be.
    assert [line["chosen"] for line in lines[:-1]] == STRANGE[:-1]


def test_unknown_texts_go_to_the_fallback_with_their_columns(path):
    seen = []

    def fallback(prompts, completions, user):
        seen.append((completions, user))
        return [0.5] * len(completions)

    AnswerStore(path).add_score("p", "known", 1.0)
    reward = HumanReward(path, fallback=fallback)
    values = reward(prompts=["p"] * 3, completions=["a", "known", "b"], user=[1, 2, 3])
    assert values == [0.5, 1.0, 0.5]
    assert seen == [(["a", "b"], [1, 3])]


def test_questions_per_call_are_limited(path):
    ask = Script(1.0, 2.0)
    reward = HumanReward(path, ask, questions_per_call=1)
    assert score(reward, "a", "b") == [1.0, None]
    assert score(reward, "a", "b") == [1.0, 2.0]


# --- prefixes


def test_only_texts_that_ended_are_asked_about_and_prefixes_go_to_the_fallback(path):
    batch = text_batch(TOKENIZER, ["the film", "a plot"], ["is good <eos>", "is slow"])
    expected = FunctionReward(lambda completions: [len(text) / 100 for text in completions])
    prefixes = expected.prefix_potentials(batch, all_lengths(batch))
    ask = Script(1.0)
    reward = HumanReward(path, ask, fallback=expected)
    values = reward.prefix_potentials(batch, all_lengths(batch))
    assert ask.asked == [("the film", " is good")]
    assert values[0].tolist() == [*prefixes[0][:-1], 1.0]
    assert values[1].tolist() == prefixes[1].tolist()
    # Now it is known, the same text before its end-of-sequence token included.
    assert reward.prefix_potentials(batch, all_lengths(batch))[0].tolist() == [*prefixes[0][:-2], 1.0, 1.0]
    assert reward.potentials(batch).tolist() == [1.0, prefixes[1][-1]]
    everything = HumanReward(path, Script(0.5), fallback=expected, ask_about="all")
    assert everything.potentials(batch).tolist() == [1.0, 0.5]


def test_instant_and_deferred_scoring_ask_alike_and_pay_alike(tmp_path):
    batch = text_batch(TOKENIZER, ["the film", "a plot"], ["is good <eos>", "is <eos>"])
    fallback = FunctionReward(lambda completions: [len(text) / 100 for text in completions])
    deferred = HumanReward(tmp_path / "1", Script(1.0, -1.0), fallback=fallback)
    instant = HumanReward(tmp_path / "2", Script(1.0, -1.0), fallback=fallback)
    at_once = deferred.prefix_potentials(batch, all_lengths(batch))
    for i, lengths in enumerate(all_lengths(batch)):
        for length in lengths:
            assert instant.potentials(batch.at([i], [length]))[0] == at_once[i][length]


# --- what goes wrong


def test_impossible_answers_and_arguments_are_named(path):
    with pytest.raises(RewardError, match="the answer is nan; expected a finite number or None"):
        score(HumanReward(path, Script(float("nan"))), "a")
    reward = HumanReward(path, Script("left"), mode="compare")
    with pytest.raises(RewardError, match="the answer is 'left'; expected first, second, tie or None"):
        score(reward, "a", "b")
    for arguments, complaint in [
        ({"mode": "rank"}, "mode='rank' must be one of 'score', 'compare'"),
        ({"ask_about": "some"}, "ask_about='some' must be one of 'complete', 'all'"),
        ({"questions_per_call": -1}, "questions_per_call=-1 must be a whole number, at least 0"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            HumanReward(path, **arguments)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\x07" * 4000])
def test_a_damaged_file_is_refused_and_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(
        AnswerStoreError, match=r"can't open the answers in .*answers.sqlite: file is not a database; it"
    ):
        HumanReward(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_not_taken_over(path):
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE scores (something TEXT)")
    connection.commit()
    connection.close()
    with pytest.raises(AnswerStoreError, match="can't open the answers"):
        AnswerStore(path)


def test_an_answer_given_while_the_file_is_locked_is_kept_and_found_again(path):
    store = AnswerStore(path, timeout=0.05)
    store.add_score("p", "before", 1.0)

    class Locks(Script):
        def score(self, prompt, completion):
            self.lock = sqlite3.connect(path)
            self.lock.execute("BEGIN EXCLUSIVE")
            return super().score(prompt, completion)

    ask = Locks(0.75)
    reward = HumanReward(store, ask)
    with pytest.raises(RewardError, match=r"database is locked; another process .*; the answer is kept in .*unsaved"):
        score(reward, "x", prompt="p")
    with pytest.raises(RewardError, match="can't .* the answers .*database is locked"):
        score(reward, "x", prompt="p")  # before anybody is asked a second time
    ask.lock.close()
    assert score(reward, "x", "before", prompt="p") == [0.75, 1.0]
    assert len(ask.asked) == 1
    assert [file.name for file in path.parent.iterdir()] == ["answers.sqlite"]


def test_an_answer_kept_beside_the_file_is_taken_in_once_by_the_next_run(path):
    store = AnswerStore(path, timeout=0.05)
    lock = sqlite3.connect(path)
    lock.execute("BEGIN EXCLUSIVE")
    for add in (lambda: store.add_score("p", "\ud800", 0.5), lambda: store.add_comparison("p", "a", "b")):
        with pytest.raises(AnswerStoreError, match="the answer is kept in"):
            add()
    lock.close()
    [first, second] = sorted(path.parent.glob("*.unsaved-*.jsonl"))
    copy = first.read_bytes()
    assert AnswerStore(path).counts() == {"scores": 1, "comparisons": 1}
    first.write_bytes(copy)  # as if the process had died between taking it in and deleting it
    again = AnswerStore(path)
    assert again.counts() == {"scores": 1, "comparisons": 1}
    assert again.score("p", "\ud800") == 0.5
    assert not first.exists()
    second.write_text("{}")
    with pytest.raises(AnswerStoreError, match="has no answers in the form they are kept in"):
        AnswerStore(path)
    assert second.exists()


def test_an_answer_that_can_be_kept_nowhere_is_in_the_error(path, monkeypatch):
    store = AnswerStore(path)
    monkeypatch.setattr(store, "_put_beside", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(AnswerStoreError, match=r"nor can it be written beside it \(No space left.*'my answer', 0.25"):
        store.add_score("p", "my answer", 0.25)


def test_processes_and_threads_share_a_file(path):
    AnswerStore(path)
    code = (
        "import sys; from textgym.rewards import AnswerStore; s = AnswerStore(sys.argv[1], timeout=30)\n"
        "for i in range(20): s.add_score('p', sys.argv[2] + str(i), 1.0)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    store = AnswerStore(path, timeout=30)
    threads = [threading.Thread(target=lambda k=k: store.add_score("p", f"thread {k}", 1.0)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in processes] == [0, 0]
    assert store.counts()["scores"] == 45


# --- exports


def test_exports_are_the_trainers_formats(path, tmp_path):
    store = AnswerStore(path)
    store.add_comparison("p", "a", "b")
    store.add_comparison("p", "c", "b", tie=True)
    store.add_score("p", "a", 1.0)
    store.add_score("p", "a", 0.0)
    store.add_score("p", "b", -1.0)
    store.add_score("p", "c", 0.5)
    store.add_score("q", "a", 0.0)
    read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]  # noqa: E731
    assert store.export_scores(tmp_path / "scores.jsonl") == 4
    assert read(tmp_path / "scores.jsonl") == [
        {"text": "pa", "score": 0.5},
        {"text": "pb", "score": -1.0},
        {"text": "pc", "score": 0.5},
        {"text": "qa", "score": 0.0},
    ]
    assert store.export_preferences(tmp_path / "pairs.jsonl") == 1
    assert read(tmp_path / "pairs.jsonl") == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert store.export_preferences(tmp_path / "pairs.jsonl", from_scores=True) == 3  # a and c are level
    assert read(tmp_path / "pairs.jsonl")[1:] == [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5},
        {"prompt": "p", "chosen": "c", "rejected": "b", "margin": 1.5},
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.jsonl", "people", "scores.jsonl"]


def test_the_fallbacks_state_is_kept(path):
    fallback = FunctionReward(lambda completions: [1.0] * len(completions)).normalized()
    reward = HumanReward(path, fallback=fallback)
    assert reward.uncalibrated() == [fallback]
    fallback.calibrate(np.array([0.0, 2.0]))
    other = HumanReward(path, fallback=FunctionReward(lambda completions: [1.0]).normalized())
    other.load_state_dict(reward.state_dict())
    assert score(other, "a") == [0.0]
    with pytest.raises(ValueError, match="has 0 fallbacks"):
        HumanReward(path).load_state_dict(reward.state_dict())

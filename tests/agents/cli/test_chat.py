"""``textgym chat``: a person and a model, a turn each, in the model's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_envs import LANGUAGE_MODEL, REWARDS
from tiny_models import save_chat_model
from typer.testing import CliRunner

from textgym.agents.cli import chat
from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig
from textgym.envs.rendering import render_turn
from textgym.language_model import load_language_model
from textgym.sampling import SamplingSettings
from textgym.talk import Talk

pytestmark = pytest.mark.usefixtures("runs_without_pictures")


@pytest.fixture(scope="module")
def run(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "talked_to"
    config = RunConfig(
        model=str(tiny_directory), reward="keywords(['good', 'film'])", rows=2, max_new_tokens=5, timesteps=10,
        eval_prompts=1, samples=0, device="cpu", threads=1, tensorboard=False, n_epochs=1, min_new_tokens=2,
        action_masking=True, top_k=9,
    )  # fmt: skip
    assert Run("ppo", config, path).train()
    return path


def talked(path: Path, lines: str, *arguments: object) -> list[str]:
    result = CliRunner().invoke(app, ["chat", str(path), *map(str, arguments)], input=lines)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_each_line_is_answered_plainly_on_a_pipe_until_it_ends(run: Path) -> None:
    answers = talked(run, "the film is\n\nvery good\n", "--seed", 1)
    assert len(answers) == 2
    assert all(2 <= len(answer.split()) <= 5 for answer in answers)
    assert "\x1b" not in "".join(answers)
    assert talked(run, "the film is\nvery good\n", "--seed", 1) == answers
    assert talked(run, "", "--seed", 1) == []
    assert len(talked(run, "the film is\n", "--max-new-tokens", 9, "--min-new-tokens", 9)[0].split()) == 9


def test_in_a_terminal_tokens_have_the_colours_of_their_rewards(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        is_terminal = True
        printed: list[Any] = []  # noqa: RUF012

        def print(self, text: Any, **_: Any) -> None:
            self.printed.append(text)

    answer = Talk(LANGUAGE_MODEL, SamplingSettings(max_new_tokens=6), REWARDS["function"], seed=2).say("the film")
    shown: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: shown.append(text))
    chat._show(Terminal(), answer)  # type: ignore[arg-type]
    assert "\x1b[38;2;" in shown[0]
    assert Terminal.printed == [f"score {answer.score:+.2f}"]
    monkeypatch.setenv("NO_COLOR", "1")
    chat._show(Terminal(), answer)  # type: ignore[arg-type]
    assert shown[1] == "".join(answer.tokens).strip("\n")


def test_line_breaks_stay_and_what_controls_a_terminal_does_not() -> None:
    tokens, rewards = ["a\n", "\nb", "\x1b[31m", ""], [0.5, -0.5, 0.0, 0.1]
    assert render_turn(tokens, None) == "a\n\nb<U+001B>[31m"
    coloured = render_turn(tokens, rewards)
    assert coloured.count("\n") == 2
    assert "\x1b[31m" not in coloured


def test_what_was_said_is_one_text_and_rewards_are_those_of_its_tokens() -> None:
    model, phi = LANGUAGE_MODEL, REWARDS["function"]
    talk = Talk(model, SamplingSettings(max_new_tokens=4), phi, seed=3)
    first, second = talk.say("the film"), talk.say("very good")
    messages = talk.transcript
    assert [message["role"] for message in messages] == ["assistant", "user", "assistant"]
    assert messages[1]["content"] == " very good"
    assert messages[0]["content"] == "".join(first.tokens)
    assert second.score is not None
    assert first.score is not None
    batch = talk._texts.batch(np.zeros(1, dtype=np.int64))  # type: ignore[union-attr]
    np.testing.assert_allclose(second.score, phi.potentials(batch), atol=1e-5)
    before = batch.at([0], [batch.completion_lengths[0] - len(second.tokens)])
    assert second.rewards is not None
    assert second.score - second.rewards.sum() == pytest.approx(phi.potentials(before)[0], abs=1e-4)


def test_a_chat_model_reads_what_its_template_gives_for_the_conversation(tmp_path: Path) -> None:
    save_chat_model(tmp_path)
    model = load_language_model(str(tmp_path), device="cpu")
    talk = Talk(model, SamplingSettings(max_new_tokens=4, chat=True), seed=1, system="be brief")
    talk.say("hi")
    talk.say("and now")
    assert talk._texts is not None
    ids = talk._texts.ids[0, : talk._texts.lengths[0]].tolist()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}, *talk.transcript]
    whole = model.tokenizer.apply_chat_template(messages, tokenize=False)
    read = model.tokenizer.decode(ids)
    assert whole.startswith(read.rstrip("\n"))
    with pytest.raises(ValueError, match="system='x' is said in the chat template"):
        Talk(model, SamplingSettings(), system="x")


def test_a_conversation_that_has_no_room_left_begins_anew() -> None:
    talk = Talk(LANGUAGE_MODEL, SamplingSettings(max_new_tokens=40, min_new_tokens=39, action_masking=True), seed=0)
    begun = [talk.say("the film is very good").begins for _ in range(4)]
    assert begun == [False, False, False, True]
    with pytest.raises(ValueError, match="no room for an answer"):
        talk.say("film " * 200)

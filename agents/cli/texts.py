"""The commands ``textgym generate`` and ``textgym evaluate``; ``agents/cli/main.py`` adds them to the others."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from textgym.agents.cli.options import FileOptions, with_file_options

if TYPE_CHECKING:
    from textgym.agents.runs.config import RunConfig
    from textgym.agents.runs.subjects import Subject
    from textgym.evaluation import Evaluation
    from textgym.language_model import LanguageModel
    from textgym.prompts.rows import PromptRow
    from textgym.rewards import Reward

EVALUATED = 256  # prompts, where nobody says how many

_Reward = Annotated[str | None, typer.Option("--reward", help="as for train; default the run's")]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="model that KL is measured against, and whose likeliest tokens top-k and top-p are; default what the run "
        "started from, and for a model of no run itself",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="run Python code that somebody else's run has as its reward, or that comes with the model"
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", help="name=value: a column that the reward reads, for every prompt; a value that is JSON is read so"
    ),
]
MaxTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="default the run's")]
MinTokens = Annotated[int | None, typer.Option("--min-new-tokens", help="default the run's")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="default the run's")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help=r"a string that ends a text, \n for a newline; default the run's")
]
Masking = Annotated[
    bool | None, typer.Option("--action-masking/--no-action-masking", help="mask special tokens; default as the run")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="with masking, default the run's")]
TopP = Annotated[float | None, typer.Option("--top-p", help="with masking, default the run's")]
Template = Annotated[
    bool,
    typer.Option(
        "--template",
        help="texts are what a user says, in the model's chat template; default where the run's prompts were "
        "conversations",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="texts are not conversations, whatever the run's prompts were")]
TemplateArguments = Annotated[
    list[str] | None,
    typer.Option("--chat-template-kwargs", help="name=value, for variables of the chat template; default the run's"),
]
_Reply = Annotated[
    str | None,
    typer.Option(
        "--reply", help="who speaks after each turn, as for train; default the run's; none: a text is one turn"
    ),
]
MaxTurns = Annotated[int | None, typer.Option("--max-turns", help="default the run's")]
MaxReplyTokens = Annotated[int | None, typer.Option("--max-reply-tokens", help="default the run's")]
MaxTotalTokens = Annotated[int | None, typer.Option("--max-total-tokens", help="default the run's")]
Seed = Annotated[int, typer.Option("--seed", help="of the sampling")]


def unescaped(text: str) -> str:
    r"""A text as typed in a shell, where ``\n`` is a newline, ``\t`` a tab and ``\\`` one backslash."""
    written = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: written[found[1]], text)


def add_texts(app: typer.Typer, console: Console, plain_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Put ``generate`` and ``evaluate`` on an app.

    :param console: for what they print
    :param plain_errors: context that says in one line what is wrong with what the user gave
    """

    @app.command()
    @with_file_options
    def generate(
        model: Annotated[
            str, typer.Argument(help="a run's folder, a directory that train wrote, any model, or embedded")
        ],
        prompt: Annotated[
            list[str] | None, typer.Option("--prompt", "-p", help="a prompt; may be given several times")
        ] = None,
        prompts: Annotated[str | None, typer.Option(help="complete those of this file; default held-out ones")] = None,
        number: Annotated[int, typer.Option("--number", "-n", min=1, help="prompts to complete, without --prompt")] = 8,
        column: Column = None,
        reward: _Reward = None,
        reference: Reference = None,
        trust_code: TrustCode = False,
        max_new_tokens: MaxTokens = None,
        min_new_tokens: MinTokens = None,
        temperature: Temperature = None,
        stop: Stop = None,
        action_masking: Masking = None,
        top_k: TopK = None,
        top_p: TopP = None,
        template: Template = False,
        raw: Raw = False,
        system: Annotated[str | None, typer.Option(help="what the system says before each --prompt")] = None,
        reply: _Reply = None,
        max_turns: MaxTurns = None,
        max_reply_tokens: MaxReplyTokens = None,
        max_total_tokens: MaxTotalTokens = None,
        chat_template_kwargs: TemplateArguments = None,
        deterministic: Annotated[bool, typer.Option(help="take the most likely token each time")] = False,
        seed: Seed = 0,
        as_json: Annotated[bool, typer.Option("--json", help="print JSON instead, a line a completion")] = False,
        *,
        file: FileOptions,
    ) -> None:
        """Complete prompts as the run does, with every token on the colour of its reward."""
        settings = sampling_settings(max_new_tokens, min_new_tokens, temperature, stop, action_masking, top_k, top_p)
        with plain_errors():
            settings["chat"] = in_template(template, raw)
            settings |= {"max_turns": max_turns, "max_reply_tokens": max_reply_tokens}
            settings["max_total_tokens"] = max_total_tokens
            from textgym.agents.runs.config import template_arguments
            from textgym.agents.runs.reports import coloured_completion
            from textgym.agents.runs.subjects import open_subject
            from textgym.evaluation import score_tokens

            subject = open_subject(model, trust_code, template_arguments(chat_template_kwargs))
            phi = reward_of(subject, reward, trust_code)
            columns = columns_of(column)
            speaker = subject.reply(reply, max_reply_tokens, trust_code)
            sampling = subject.sampling_with(settings, speaker is not None)
            if system is not None and (raw or not prompt):
                raise ValueError(f"--system {system!r} is said before each --prompt, in the chat template (not --raw)")
            _check_of_file(file, prompts)
            if prompt and prompts is not None:
                raise ValueError(f"--prompt {prompt[0]!r} and --prompts {prompts!r}: give one of them")
            if prompt:
                rows = _prompt_rows(prompt, columns)
                if system is not None:
                    rows = [_behind_system(row, subject.model, system) for row in rows]
                sampling = dataclasses.replace(sampling, max_prompt_tokens=None)  # whoever types it wants all of it
            else:
                found = _held_out(subject.config) if prompts is None else _from_file(prompts, file, subject)
                rows = _with_columns(found, columns)
                _say_how_many(console, len(rows), number, as_json)
                rows = rows[:number]
            # A model of no run is its own reference: nothing to measure, and nothing to open.
            alone = reference is None and subject.run is None and not sampling.restricted
            base = None if alone else subject.reference(reference)
            completions = score_tokens(
                subject.model, base, phi, rows, sampling, deterministic=deterministic, seed=seed, reply=speaker,
                restricting=restricting(subject, base, reference) if sampling.restricted else None,
            )  # fmt: skip
            said = {
                "model": subject.name,
                "reference": None if base is None else base.name,
                "reward": phi.name,
                "reply": None if speaker is None else speaker.name,
                **sampling.as_dict(),
                "deterministic": deterministic,
                "seed": seed,
            }
            for completion in completions:
                if as_json:
                    print(json.dumps({**completion.to_dict(), "settings": said}, ensure_ascii=False))
                else:
                    console.print(coloured_completion(completion))
                    console.print()
            if not as_json:
                against = "no reference" if base is None else f"KL against {base.name}"
                greedy = "the likeliest tokens, " * deterministic
                replies = "" if speaker is None else f"; reply {speaker.name}"
                said_so = f"{greedy}{sampling.said()}; reward {phi.name}{replies}; {against}"
                console.print(said_so, style="dim", highlight=False, markup=False)

    @app.command()
    @with_file_options
    def evaluate(
        models: Annotated[list[str], typer.Argument(help="runs, directories that train wrote, or any models")],
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="folder for evaluation.json, .md and .png")
        ] = None,
        number: Annotated[
            int | None, typer.Option("--number", "-n", min=1, help=f"prompts; default {EVALUATED} held-out ones")
        ] = None,
        completions: Annotated[int, typer.Option(min=1, help="completions of each prompt")] = 1,
        reward: _Reward = None,
        reference: Reference = None,
        no_reference: Annotated[bool, typer.Option("--no-reference", help="don't evaluate the reference, too")] = False,
        trust_code: TrustCode = False,
        prompts: Annotated[
            str | None, typer.Option(help="evaluate on the prompts of this file; default the first run's held-out ones")
        ] = None,
        column: Column = None,
        max_new_tokens: MaxTokens = None,
        min_new_tokens: MinTokens = None,
        temperature: Temperature = None,
        stop: Stop = None,
        action_masking: Masking = None,
        top_k: TopK = None,
        top_p: TopP = None,
        template: Template = False,
        raw: Raw = False,
        reply: _Reply = None,
        max_turns: MaxTurns = None,
        max_reply_tokens: MaxReplyTokens = None,
        max_total_tokens: MaxTotalTokens = None,
        chat_template_kwargs: TemplateArguments = None,
        seed: Seed = 0,
        *,
        file: FileOptions,
    ) -> None:
        """Measure models on prompts that none of them was trained on, side by side, with bootstrap 95 % intervals.

        Prompts, reward, reference, reply, budgets and stop strings are those of the first model's run; temperature
        and masks are each model's own.
        """
        settings = sampling_settings(max_new_tokens, min_new_tokens, temperature, stop, action_masking, top_k, top_p)
        with plain_errors():
            settings["chat"] = in_template(template, raw)
            settings |= {"max_turns": max_turns, "max_reply_tokens": max_reply_tokens}
            settings["max_total_tokens"] = max_total_tokens
            from textgym.agents.runs import reports
            from textgym.agents.runs.config import template_arguments
            from textgym.agents.runs.subjects import Subject, open_subject
            from textgym.evaluation import check_reference
            from textgym.evaluation import evaluate as measure

            _check_of_file(file, prompts)
            arguments = template_arguments(chat_template_kwargs)
            subjects = [open_subject(path, trust_code, arguments) for path in dict.fromkeys(models)]
            first = subjects[0]
            phi = reward_of(first, reward, trust_code)
            base = first.reference(reference)
            for subject in subjects:
                check_reference(subject.model, base)
            if prompts is None:
                rows = _unseen(console, subjects, _held_out(first.config))
            else:
                rows = _from_file(prompts, file, first)
                _warn_of_seen(console, subjects, rows, prompts)
            rows = _with_columns(rows, columns_of(column))
            if number is not None:
                _say_how_many(console, len(rows), number)
            rows = rows[: (EVALUATED if prompts is None else None) if number is None else number]
            speaker = first.reply(reply, max_reply_tokens, trust_code)
            of_task = ["max_new_tokens", "stop", "chat"]
            if speaker is not None:
                of_task += ["max_turns", "max_reply_tokens", "max_total_tokens", "reply_overflow"]
            task = {name: getattr(first.sampling, name) for name in of_task}
            if any(settings[name] for name in ("max_new_tokens", "max_turns", "max_reply_tokens")):
                task.pop("max_total_tokens", None)  # it follows from these
            given = {**task, **{name: value for name, value in settings.items() if value is not None}}
            if not no_reference and base is not first.model and base.name not in models:
                subjects.insert(0, Subject(base.name, base, first.config, first.run, first.sampling))
            evaluations: dict[str, Evaluation] = {}
            for subject in subjects:
                sampling = subject.sampling_with(given, speaker is not None)
                with console.status(f"{subject.name}: {len(rows)} prompts"):
                    evaluations[subject.name] = measure(
                        subject.model, base, phi, rows, sampling, completions_per_prompt=completions, seed=seed,
                        reply=speaker,
                        restricting=restricting(subject, base, reference) if sampling.restricted else None,
                    )  # fmt: skip
            console.print(reports.comparison_table(evaluations))
            _say_settings(console, evaluations)
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                (output / "evaluation.json").write_text(reports.comparison_json(evaluations), encoding="utf-8")
                (output / "evaluation.md").write_text(reports.comparison_markdown(evaluations), encoding="utf-8")
                reports.draw_comparison(evaluations, output / "evaluation.png")
                console.print(f"Wrote evaluation.json, evaluation.md and evaluation.png to [bold]{output}[/bold]")


def sampling_settings(
    max_new_tokens: int | None,
    min_new_tokens: int | None,
    temperature: float | None,
    stop: list[str] | None,
    action_masking: bool | None,
    top_k: int | None,
    top_p: float | None,
) -> dict[str, Any]:
    """What flags say about sampling; None where they say nothing."""
    return {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "stop": tuple(map(unescaped, stop)) if stop else None,
        "action_masking": action_masking,
        "top_k": top_k,
        "top_p": top_p,
    }


def in_template(template: bool, raw: bool) -> bool | None:
    """Whether texts are said in the chat template; None where no flag says it."""
    if template and raw:
        raise ValueError("--template and --raw say opposite things; give one of them")
    return True if template else False if raw else None


def reward_of(subject: Subject, given: str | None, trusted: bool) -> Reward:
    """What is given, or the run's reward, whose code may need trust."""
    from textgym.agents.runs.trust import check_code
    from textgym.rewards.opening import load_reward

    if given is None:
        check_code([subject.config.reward], subject.run or subject.name, trusted)
    return load_reward(subject.config.reward if given is None else given, subject.config.trust_remote_code)


def restricting(subject: Subject, base: LanguageModel | None, given: str | None) -> LanguageModel | None:
    """Whose likeliest tokens a subject's masks are: what is given, else the model that its own run started from."""
    if given is None and subject.run is not None:
        return base if base is not None and base.name == subject.config.model else subject.reference()
    if given is None and subject.sampling.restricted:
        raise ValueError(
            f"{subject.name} samples the likeliest tokens of the model that its training started from, which it "
            "doesn't name: give --reference MODEL, or --no-action-masking"
        )
    return base


def columns_of(given: list[str] | None) -> dict[str, Any]:
    """Columns from ``name=value``."""
    columns: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"column={text!r} must be name=value, such as target=good")
        try:
            columns[name] = json.loads(value)
        except ValueError:
            columns[name] = value
    return columns


def _prompt_rows(prompts: list[str], columns: dict[str, Any]) -> list[PromptRow]:
    from textgym.prompts.rows import PromptRow

    return [PromptRow(prompt, dict(columns)) for prompt in prompts]


def _behind_system(row: PromptRow, model: LanguageModel, system: str) -> PromptRow:
    from textgym.prompts.fitting import as_chat, is_chat

    if is_chat(row, model.vocabulary):
        raise ValueError(f"the prompt {row.prompt[:60]!r} is in the chat template already: --system has no place in it")
    return as_chat(row, model.vocabulary, system)


def _with_columns(rows: list[PromptRow], columns: dict[str, Any]) -> list[PromptRow]:
    return [dataclasses.replace(row, columns={**row.columns, **columns}) for row in rows] if columns else rows


def _held_out(config: RunConfig) -> list[PromptRow]:
    from textgym.agents.runs.prompts import load_prompts

    return list(load_prompts(config)[1])


def _check_of_file(file: FileOptions, prompts: str | None) -> None:
    """:raises ValueError: if it is said how a file is read, but not which"""
    if prompts is None and file.given():
        raise ValueError(f"{', '.join(file.given())}: how --prompts is read, which isn't given")


def _from_file(path: str, file: FileOptions, first: Subject) -> list[PromptRow]:
    from textgym.agents.runs.prompts import rows_of_file

    reading = dataclasses.replace(file, prompt_column=file.prompt_column or first.config.prompt_column)
    return list(rows_of_file(path, reading, first.model.tokenizer))


def _unseen(console: Console, subjects: list[Subject], rows: list[PromptRow]) -> list[PromptRow]:
    """Held-out prompts of the first subject's run that no subject was trained on.

    :raises ValueError: if there are none
    """
    seen = [subject.learned_from(rows) for subject in subjects]
    if all(seen[0]):  # its run holds nothing out, and has said so
        _warn_of_seen(console, subjects, rows, "its own run, which holds none out")
        return rows
    for subject, learned in zip(subjects, seen, strict=True):
        if any(learned):
            console.print(
                f"[bold]Left out[/bold] {sum(learned)} of the {len(rows)} held-out prompts: {subject.name} was trained "
                "on them",
                highlight=False,
            )
    kept = [row for row, learned in zip(rows, zip(*seen, strict=True), strict=True) if not any(learned)]
    if not kept:
        raise ValueError(
            f"there is no held-out prompt of {subjects[0].name} that none of the models was trained on: give --prompts "
            "FILE with new ones"
        )
    return kept


def _warn_of_seen(console: Console, subjects: list[Subject], rows: list[PromptRow], path: str) -> None:
    for subject in subjects:
        count = sum(subject.learned_from(rows))
        if count:
            console.print(
                f"[bold yellow]Warning[/bold yellow] {subject.name} was trained on {count} of the {len(rows)} prompts "
                f"in {path}: its figures are not those of new prompts",
                highlight=False,
            )


def _say_how_many(console: Console, available: int, asked: int, quiet: bool = False) -> None:
    if asked > available and not quiet:
        console.print(f"{available} prompts, fewer than the {asked} asked for", highlight=False)


def _say_settings(console: Console, evaluations: dict[str, Evaluation]) -> None:
    """How texts were sampled: one line, or one for each model where they differ."""
    from textgym.sampling import SamplingSettings

    said: dict[str, list[str]] = {}
    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    for name, evaluation in evaluations.items():
        sampling = SamplingSettings(**{key: evaluation.settings[key] for key in names})
        said.setdefault(sampling.said(), []).append(name)
    for text, of in said.items():
        whose = f"{', '.join(of)}: " if len(said) > 1 else ""
        console.print(f"{whose}{text}", style="dim", highlight=False)
    settings = next(iter(evaluations.values())).settings
    replies = "" if settings["reply"] is None else f"; reply {settings['reply']}"
    said_so = f"reward {settings['reward']}{replies}; KL and perplexity against {settings['reference']}"
    console.print(said_so, style="dim", highlight=False, markup=False)

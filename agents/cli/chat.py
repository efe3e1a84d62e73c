"""The command ``textgym chat``; ``agents/cli/main.py`` adds it to the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from rich.console import Console

from textgym.agents.cli import texts


def add_chat(app: typer.Typer, console: Console, plain_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Put ``chat`` on an app.

    :param console: for what it prints
    :param plain_errors: context that says in one line what is wrong with what the user gave
    """

    @app.command()
    def chat(
        model: Annotated[
            str, typer.Argument(help="a run's folder, a directory that train wrote, any model, or embedded")
        ],
        reward: Annotated[
            str | None, typer.Option("--reward", help="colours tokens; as for train; default the run's; none")
        ] = None,
        column: texts.Column = None,
        reference: texts.Reference = None,
        trust_code: texts.TrustCode = False,
        max_new_tokens: texts.MaxTokens = None,
        min_new_tokens: texts.MinTokens = None,
        temperature: texts.Temperature = None,
        stop: texts.Stop = None,
        action_masking: texts.Masking = None,
        top_k: texts.TopK = None,
        top_p: texts.TopP = None,
        template: texts.Template = False,
        raw: texts.Raw = False,
        system: Annotated[str | None, typer.Option(help="what the system says, in the chat template")] = None,
        separator: Annotated[str, typer.Option(help=r"in plain texts, before what you say; \n for a newline")] = " ",
        chat_template_kwargs: texts.TemplateArguments = None,
        deterministic: Annotated[bool, typer.Option(help="take the most likely token each time")] = False,
        seed: texts.Seed = 0,
    ) -> None:
        """Talk to a model as it was trained, a turn each; Ctrl-D ends.

        You are the other speaker, in its chat template or in plain text. Tokens have the colours of their rewards.
        """
        settings = texts.sampling_settings(
            max_new_tokens, min_new_tokens, temperature, stop, action_masking, top_k, top_p
        )
        with plain_errors():
            settings["chat"] = texts.in_template(template, raw)
            from textgym.action_masks import masks_of
            from textgym.agents.runs.config import template_arguments
            from textgym.agents.runs.subjects import open_subject
            from textgym.chat.chat_prompts import has_template
            from textgym.talk import Talk

            subject = open_subject(model, trust_code, template_arguments(chat_template_kwargs))
            if settings["chat"] is None and subject.run is None:
                settings["chat"] = has_template(subject.model.tokenizer) or None
            sampling = subject.sampling_with(settings)
            base = None
            if sampling.restricted:
                base = texts.restricting(subject, subject.reference(reference), reference)
            phi = None
            if reward != "none" and (reward is not None or subject.run is not None):
                phi = texts.reward_of(subject, reward, trust_code)
            talk = Talk(
                subject.model, sampling, phi, texts.columns_of(column), masks_of(sampling, subject.model, base), seed,
                system, texts.unescaped(separator), deterministic,
            )  # fmt: skip
            if sys.stdin.isatty():
                scored = "" if phi is None else f"; colours: reward {phi.name}"
                console.print(f"{sampling.one_turn().said()}{scored}. Ctrl-D ends", style="dim", highlight=False)
            for text in _lines():
                _show(console, talk.say(text))


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, but for empty lines."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _show(console: Console, answer: Any) -> None:
    from textgym.envs.rendering import render_turn

    if answer.begins:
        Console(stderr=True).print("There was no room for more: the conversation begins anew", style="dim")
    print(render_turn(answer.tokens, answer.rewards if console.is_terminal else None).strip("\n"), flush=True)
    if answer.score is not None and console.is_terminal:
        console.print(f"score {answer.score:+.2f}", style="dim", highlight=False)

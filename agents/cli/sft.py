"""The command for a supervised warm start; ``agents/cli/main.py`` adds it to the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from textgym.agents.cli.options import FileOptions, with_file_options


def add_warm_start(
    app: typer.Typer, console: Console, plain_errors: Callable[[], AbstractContextManager[None]], name: str = "sft"
) -> None:
    """Put a warm start on an app.

    :param console: for the report
    :param plain_errors: context that says in one line what is wrong with what the user gave
    :param name: what the command is called
    """

    @app.command(name)
    @with_file_options
    def sft(
        data: Annotated[str, typer.Argument(help="file or hub id with prompts and completions, as --prompts of train")],
        output: Annotated[
            Path, typer.Option("--output", "-o", help="new directory for the model, for --model of train")
        ],
        model: Annotated[str, typer.Option(help="embedded, smollm2, gemma3, a directory or a hub id")] = "embedded",
        tokenizer: Annotated[str | None, typer.Option(help="another tokenizer than the model's own")] = None,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
        ] = False,
        chat_template_kwargs: Annotated[
            list[str] | None, typer.Option(help="name=value, for variables of the chat template; several times")
        ] = None,
        column: Annotated[str, typer.Option(help="the column of DATA with the completions")] = "completion",
        answers: Annotated[
            Literal["all", "last"], typer.Option(help="which answers of a conversation are learned")
        ] = "all",
        validation: Annotated[
            str | None, typer.Option(help="data to measure on; by default a part of DATA, split by prompt")
        ] = None,
        validation_share: Annotated[float, typer.Option(help="of the prompts, without --validation")] = 0.1,
        epochs: Annotated[int, typer.Option(help="most passes over the data")] = 3,
        patience: Annotated[
            int, typer.Option(help="passes without a smaller validation loss to stop after; 0 for never")
        ] = 1,
        batch_size: Annotated[int, typer.Option(help="rows of a batch")] = 16,
        gradient_accumulation: Annotated[int, typer.Option(help="batches of a step")] = 1,
        learning_rate: Annotated[float, typer.Option(help="of AdamW")] = 5e-5,
        warmup: Annotated[float, typer.Option(help="share of the steps in which it rises")] = 0.1,
        weight_decay: Annotated[float, typer.Option(help="of AdamW")] = 0.0,
        max_length: Annotated[
            int | None, typer.Option(help="most tokens of a row; default what the model reads")
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
        seed: Annotated[int, typer.Option(help="of the split and the order")] = 0,
        progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
        *,
        file: FileOptions,
    ) -> None:
        """Train a language model on reference completions, before or instead of reinforcement learning."""
        with plain_errors():
            from textgym.agents.imitation import warm_start
            from textgym.agents.runs.config import template_arguments
            from textgym.agents.runs.prompts import rows_of_file
            from textgym.language_model import load_language_model, load_vocabulary

            opening: dict[str, Any] = {
                "tokenizer": tokenizer,
                "trust_remote_code": trust_remote_code,
                "chat_template_kwargs": template_arguments(chat_template_kwargs),
            }
            vocabulary = load_vocabulary(model, **opening)

            given, measured = rows_of_file(data, file, vocabulary.tokenizer), None
            if validation is not None:
                measured = rows_of_file(validation, replace(file, split=None), vocabulary.tokenizer)
            report = warm_start(
                load_language_model(model, device=device, **opening),
                given,
                column,
                answers=answers,
                output=output,
                validation=measured,
                validation_share=validation_share,
                epochs=epochs,
                patience=patience or None,
                batch_size=batch_size,
                gradient_accumulation=gradient_accumulation,
                learning_rate=learning_rate,
                warmup=warmup,
                weight_decay=weight_decay,
                max_length=max_length,
                seed=seed,
                progress_bar=progress,
            )
            console.print(
                f"Perplexity per completion token {report.perplexity_before:.2f} before and "
                f"{report.perplexity_after:.2f} after {report.best_epoch} of {report.epochs} passes over "
                f"{report.training_rows:,} rows, measured on {report.validation_rows or report.training_rows:,}",
                highlight=False,
            )
            console.print(f"Wrote the model to [bold]{escape(str(output))}[/bold]")

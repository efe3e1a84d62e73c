"""The command ``textgym train-reward``; ``agents/cli/main.py`` adds it to the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape


def add_train_reward(
    app: typer.Typer, console: Console, plain_errors: Callable[[], AbstractContextManager[None]]
) -> None:
    """Put ``train-reward`` on an app.

    :param console: for the report
    :param plain_errors: context that says in one line what is wrong with what the user gave
    """

    @app.command("train-reward")
    def train_reward(
        data: Annotated[
            str,
            typer.Argument(
                help="file or folder (JSON lines, JSON, CSV, TSV, Parquet) with preference pairs, scores or labels"
            ),
        ],
        output: Annotated[Path, typer.Option("--output", "-o", help="directory for the model and its report")],
        model: Annotated[
            str, typer.Option(help="embedded, smollm2, gemma3, minilm, a directory or a hub id")
        ] = "embedded",
        validation: Annotated[
            Path | None, typer.Option(help="data to measure on; by default a part of DATA, split by prompt")
        ] = None,
        kind: Annotated[
            Literal["preferences", "scores", "labels", "tasks"] | None,
            typer.Option(
                help="by default what the columns say; tasks, where a column 'task' has several, must be said"
            ),
        ] = None,
        column: Annotated[
            list[str] | None, typer.Option(help="what DATA calls a column, such as score=rating; may be repeated")
        ] = None,
        split: Annotated[str | None, typer.Option(help="which part of DATA, where it has several")] = None,
        classes: Annotated[str | None, typer.Option(help="classes in their order, such as bad,good")] = None,
        loss: Annotated[
            Literal["bradley_terry", "mse", "huber", "cross_entropy", "bce"] | None,
            typer.Option(help="by default bradley_terry for preferences, mse for scores, bce or cross_entropy"),
        ] = None,
        activation: Annotated[
            Literal["identity", "tanh", "sigmoid"] | None, typer.Option(help="of the output; default identity")
        ] = None,
        huber_delta: Annotated[float, typer.Option(help="error from which the Huber loss is linear")] = 1.0,
        centring: Annotated[float, typer.Option(help="coefficient of the squared sum of a pair's scores")] = 0.0,
        balanced: Annotated[bool, typer.Option("--balanced", help="weigh classes inversely to their number")] = False,
        head: Annotated[
            Literal["linear", "mlp", "cnn"],
            typer.Option(help="a layer or an MLP on one state, or convolutions over the states of all tokens"),
        ] = "linear",
        head_size: Annotated[
            int | None, typer.Option(help="hidden units of mlp, filters of each size of cnn", show_default=False)
        ] = None,
        head_dropout: Annotated[float, typer.Option(help="of mlp and cnn")] = 0.1,
        head_layers: Annotated[
            Literal["last", "all"],
            typer.Option(help="whose states mlp and cnn read: the last layer's, or all side by side"),
        ] = "last",
        freeze_backbone: Annotated[bool, typer.Option("--freeze-backbone", help="train the head only")] = False,
        lora_rank: Annotated[
            int | None, typer.Option(help="train LoRA matrices of this rank instead of the backbone's weights")
        ] = None,
        bf16: Annotated[bool, typer.Option("--bf16", help="compute the backbone in bfloat16 while training")] = False,
        prefixes: Annotated[
            Literal["none", "random", "all"] | None,
            typer.Option(help="which beginnings of texts to learn from; default all for causal models"),
        ] = None,
        prefix_weight: Annotated[float, typer.Option(help="share of the loss that lies on them")] = 0.25,
        epochs: Annotated[int, typer.Option(help="most passes over the data")] = 3,
        batch_size: Annotated[int, typer.Option(help="rows of a batch")] = 32,
        gradient_accumulation: Annotated[int, typer.Option(help="batches of a step")] = 1,
        learning_rate: Annotated[
            float | None,
            typer.Option(help="default 5e-5, with --lora-rank 5e-4, frozen 1e-3", show_default=False),
        ] = None,
        warmup: Annotated[float, typer.Option(help="share of the steps in which it rises")] = 0.1,
        weight_decay: Annotated[float, typer.Option(help="of AdamW")] = 0.01,
        patience: Annotated[
            int, typer.Option(help="epochs without a smaller validation loss to stop after; 0 for never")
        ] = 2,
        validation_share: Annotated[float, typer.Option(help="of the prompts, without --validation; 0 for none")] = 0.1,
        max_length: Annotated[int | None, typer.Option(help="most tokens of a text")] = None,
        threshold: Annotated[
            float | None, typer.Option(help="score above which a text counts as positive in the report")
        ] = None,
        seed: Annotated[int, typer.Option(help="of the head, the split and the order")] = 0,
        members: Annotated[int, typer.Option(help="train an ensemble of so many, with seeds one after the other")] = 1,
        bootstrap: Annotated[
            bool, typer.Option("--bootstrap", help="draw the rows of each member with replacement")
        ] = False,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", "--trust-code", help="run Python code that comes with the model")
        ] = False,
        chat_template_kwargs: Annotated[
            list[str] | None, typer.Option(help="name=value, for variables of the chat template; several times")
        ] = None,
        device: Annotated[Literal["auto", "cpu"], typer.Option(help="auto is the GPU where there is one")] = "auto",
        resume: Annotated[bool, typer.Option("--resume", help="go on with the run in OUTPUT")] = False,
        progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
    ) -> None:
        """Train a reward model, or an ensemble, on preference pairs, scores, labels or several tasks."""
        with plain_errors():
            from textgym.agents.runs.config import template_arguments
            from textgym.reward_training import report_table
            from textgym.reward_training import train_reward as train

            report = train(
                data,
                output,
                model=model,
                validation=validation,
                kind=kind,
                columns=_named_columns(column or []),
                classes=None if classes is None else [name.strip() for name in classes.split(",")],
                split=split,
                members=members,
                bootstrap=bootstrap,
                resume=resume,
                progress_bar=progress,
                device=device,
                trust_remote_code=trust_remote_code,
                chat_template_kwargs=template_arguments(chat_template_kwargs),
                loss=loss,
                activation=activation,
                huber_delta=huber_delta,
                centring=centring,
                class_weights="balanced" if balanced else None,
                head=head,
                head_size=head_size,
                head_dropout=head_dropout,
                head_layers=head_layers,
                freeze_backbone=freeze_backbone,
                lora_rank=lora_rank,
                bf16=bf16,
                prefixes=prefixes,
                prefix_weight=prefix_weight,
                epochs=epochs,
                batch_size=batch_size,
                gradient_accumulation=gradient_accumulation,
                learning_rate=learning_rate,
                warmup=warmup,
                weight_decay=weight_decay,
                patience=patience or None,
                validation_share=validation_share,
                max_length=max_length,
                threshold=threshold,
                seed=seed,
            )
            held_out = report.rows["validation"]
            measured = f"{held_out:,} others" if held_out else "the same"
            console.print(f"Trained on {report.rows['training']:,} rows and measured on {measured}", highlight=False)
            console.print(report_table(report, escape(output.name)))
            console.print(f"Wrote the model and its report to [bold]{escape(str(output))}[/bold]")


def _named_columns(given: list[str]) -> dict[str, str]:
    """``["score=rating"]`` as ``{"score": "rating"}``."""
    columns = {}
    for text in given:
        name, equals, column = text.partition("=")
        if not (name and equals and column):
            raise ValueError(f"--column {text!r} must be NAME=COLUMN, such as score=rating")
        columns[name] = column
    return columns

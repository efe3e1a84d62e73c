"""A supervised warm start: behaviour cloning on reference completions, with ``transformers.Trainer``.

Reinforcement learning finds what the policy writes now and then; what it never writes it must be shown first. Only
tokens of completions are learned, each with its end: the chat template's end of turn after a conversation, else
end-of-sequence. Of a conversation all answers of the assistant are learned. They are written as the environment's
policy would write them, token for token after the prompt. ::

    report = warm_start("embedded", rows, output="warm")            # rows of {"prompt": ..., "completion": ...}
    env = gym.make_vec("TextGen-v0", language_model="warm")         # policy and reference both start there

An agent or a policy is trained in place; then the environment's reference stays what it was, and the KL to it begins
with what was learned here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_choice, check_int, check_number
from textgym.continuation import continuation_ids
from textgym.language_model import LanguageModel, load_language_model
from textgym.model_sources import quiet_progress
from textgym.prompts.assistant_turns import assistant_mask
from textgym.prompts.fitting import fit_prompt
from textgym.prompts.opening import as_prompt_source, split_prompts
from textgym.prompts.rows import PromptRows
from textgym.vocabulary import Vocabulary, is_encoder_decoder

Learner: TypeAlias = "str | Path | PreTrainedModel | LanguageModel | LanguageModelPolicy | TextOnPolicyAlgorithm"
COLUMN = "completion"
IGNORED = -100  # the label of tokens that transformers takes no loss of


@dataclasses.dataclass(frozen=True)
class WarmStartReport:
    """What a warm start did.

    ``loss_before`` and ``loss_after`` are nats per completion token, ends included, over the validation rows, or over
    the training rows where there are none.

    :param language_model: the model that learned
    :param training_rows: how many rows it learned from
    :param validation_rows: how many it was measured on
    :param tokens: of the training rows that are learned, those of their completions and of earlier answers
    :param epochs: passes that were made
    :param best_epoch: after which pass the weights are those that stayed; 0 where none helped
    :param seconds: that training took
    :param history: of each pass ``epoch`` and ``loss``, of the validation rows or else of the training rows
    """

    language_model: LanguageModel
    loss_before: float
    loss_after: float
    training_rows: int
    validation_rows: int
    tokens: int
    epochs: int
    best_epoch: int
    seconds: float
    history: list[dict[str, float]]

    @property
    def perplexity_before(self) -> float:
        """Per completion token."""
        return math.exp(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """Per completion token."""
        return math.exp(self.loss_after)


@dataclasses.dataclass(frozen=True)
class _Example:
    """Token ids of a prompt and of its completion, and which of the prompt are learned, too."""

    prompt: list[int]
    completion: list[int]
    written: list[bool]

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        return len(self.completion) + sum(self.written)


def warm_start(
    model: Learner,
    prompts: Any,
    completions: Sequence[str] | str = COLUMN,
    *,
    answers: Literal["all", "last"] = "all",
    output: str | os.PathLike[str] | None = None,
    validation: Any = None,
    validation_share: float = 0.1,
    epochs: int = 3,
    patience: int | None = 1,
    batch_size: int = 16,
    gradient_accumulation: int = 1,
    learning_rate: float = 5e-5,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    max_length: int | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress_bar: bool = False,
) -> WarmStartReport:
    """Train a language model on reference completions of prompts. ::

        >>> rows = [{"prompt": f"film {i} is", "completion": " good."} for i in range(20)]
        >>> report = warm_start("embedded", rows, epochs=1, learning_rate=1e-3)
        >>> report.training_rows, report.validation_rows, report.loss_after < report.loss_before
        (18, 2, True)

    :param model: what learns. An agent, a policy, a :class:`~textgym.language_model.LanguageModel` or a transformers
        model learns in place; what ``language_model=`` opens by name is opened and trained
    :param prompts: rows with a fixed number, as environments take them
    :param completions: the column of the rows that has them, or as many texts as there are prompts. Text goes on where
        the prompt ends, so most begin with a space
    :param answers: which answers of a conversation are learned: ``"all"`` that the assistant gave, or the ``"last"``
        alone, its completion. An encoder-decoder writes no other
    :param output: a new directory for the trained model and its tokenizer, which ``language_model=`` opens
    :param validation: rows to measure on, with the same column; by default a part of ``prompts``
    :param validation_share: of the different prompts; 0 measures on the training rows and never stops early
    :param epochs: most passes over the rows
    :param patience: passes without a smaller validation loss to stop after; None for never. The weights of the pass
        with the smallest one stay
    :param batch_size: rows of a batch
    :param gradient_accumulation: batches of a step
    :param learning_rate: of AdamW; it rises in the first ``warmup`` of the steps and then falls to 0 linearly
    :param warmup: share of the steps
    :param weight_decay: of AdamW
    :param max_grad_norm: gradients are scaled down to this norm
    :param max_length: most tokens of a row, default what the model can read; prompts are cut as those of an
        environment, and a completion that is longer by itself loses its end
    :param tokenizer: another one than the model's own; needed with a transformers model
    :param device: where a model that is opened by name learns
    :param seed: of the split and the order
    :param progress_bar: show one
    :return: figures, and the model
    :raises ValueError: if an option, the rows or the directory does not fit, or a completion can't be written
    :raises ModuleNotFoundError: if accelerate is missing, which ``transformers.Trainer`` needs
    """
    _check_accelerate()
    _check_options(epochs, patience, batch_size, gradient_accumulation, validation_share, max_length)
    for name, value in (("learning_rate", learning_rate), ("max_grad_norm", max_grad_norm)):
        check_number(name, value, low=0.0, open_low=True)
    check_number("warmup", warmup, low=0.0, high=0.99)
    check_number("weight_decay", weight_decay, low=0.0)
    folder = None if output is None else _free(Path(output).expanduser())
    lm = _language_model(model, tokenizer, device)
    training, held_out, column = _rows(prompts, completions, validation, validation_share, seed, lm)
    check_choice("answers", answers, ("all", "last"))
    every = answers == "all" and not is_encoder_decoder(lm.model.config)
    examples = _encode(lm, training, column, max_length, "prompts", every)
    checked = _encode(lm, held_out, column, max_length, "validation", every) if held_out is not None else []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            learning_rate=learning_rate,
            warmup_steps=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not progress_bar,
            remove_unused_columns=False,
            dataloader_pin_memory=lm.device.type == "cuda",
            use_cpu=lm.device.type == "cpu",
            seed=seed,
            data_seed=seed,
        )
        trainer = _CompletionTrainer(lm, examples, checked, patience, arguments)
        trainer.run()
    report = WarmStartReport(
        language_model=lm,
        loss_before=trainer.losses[0],
        loss_after=trainer.losses[trainer.best],
        training_rows=len(examples),
        validation_rows=len(checked),
        tokens=sum(example.targets for example in examples),
        epochs=len(trainer.losses) - 1,
        best_epoch=trainer.best,
        seconds=time.monotonic() - started,
        history=[{"epoch": float(i), "loss": loss} for i, loss in enumerate(trainer.losses)],
    )
    if folder is not None:
        lm.save_pretrained(folder)
    return report


class _CompletionTrainer(Trainer):
    """``transformers.Trainer`` on completion tokens, without dropout; it keeps the best weights in memory.

    - ``losses``: before training and after each pass
    - ``best``: which of these is that of the weights

    :param lm: what learns
    :param training: its rows
    :param validation: rows to choose the pass by; without any the last one is taken
    :param patience: see :func:`warm_start`
    :param arguments: of ``transformers.Trainer``
    """

    def __init__(
        self,
        lm: LanguageModel,
        training: list[_Example],
        validation: list[_Example],
        patience: int | None,
        arguments: TrainingArguments,
    ) -> None:
        super().__init__(
            lm.model,
            arguments,
            data_collator=lambda examples: _collate(lm, examples),
            train_dataset=training,
            eval_dataset=validation or training,
        )
        self.remove_callback(PrinterCallback)  # it prints every log where there is no progress bar
        self.lm, self.chooses, self.patience = lm, bool(validation), patience
        self.losses: list[float] = []
        self.best = 0
        self._weights: list[Tensor] = []  # of the best pass

    def run(self) -> None:
        """Measure, train, and take the best weights."""
        home = self.lm.device
        try:
            self._note(self._mean_loss())
            with quiet_progress():
                self.train()
        finally:
            self.lm.model.to(home).eval()
            self.lm.model.zero_grad(set_to_none=True)
        if self.chooses:
            self._restore()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Mean cross-entropy of the completion tokens, the model's own."""
        model.eval()  # Trainer switches dropout on
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss[0] if isinstance(loss, tuple) else loss
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()} at step {self.state.global_step + 1}: lower learning_rate")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss over all tokens; Trainer's own is a mean of batches' means."""
        self._note(self._mean_loss())
        metrics = {"eval_loss": self.losses[-1]}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        passed = len(self.losses) - 1 - self.best
        if self.chooses and self.patience is not None and passed >= self.patience:
            self.control.should_training_stop = True
        return metrics

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the report has the figures."""

    def _note(self, loss: float) -> None:
        self.losses.append(loss)
        if not self.chooses or loss <= min(self.losses):
            self.best = len(self.losses) - 1
            if self.chooses:
                self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self._learning()]

    @torch.no_grad()
    def _restore(self) -> None:
        if self.best == len(self.losses) - 1:
            return
        for parameter, weights in zip(self._learning(), self._weights, strict=True):
            parameter.copy_(weights)

    def _learning(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.lm.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _mean_loss(self) -> float:
        """Nats per completion token over the rows to measure on."""
        model = self.lm.model.eval()
        total, tokens = 0.0, 0
        examples: Any = self.eval_dataset
        for start in range(0, len(examples), self.args.per_device_train_batch_size):
            batch = _collate(self.lm, examples[start : start + self.args.per_device_train_batch_size])
            count = int((batch["labels"] != IGNORED).sum())
            loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).loss
            total, tokens = total + loss.item() * count, tokens + count
        return total / tokens


def _collate(lm: LanguageModel, examples: list[_Example]) -> dict[str, Tensor]:
    """A batch, padded on the right: what the model reads, and labels where completions are."""
    if is_encoder_decoder(lm.model.config):
        texts = [example.prompt for example in examples]
        labels = [example.completion for example in examples]
    else:
        texts = [example.prompt + example.completion for example in examples]
        labels = [
            [i if own else IGNORED for i, own in zip(example.prompt, example.written, strict=True)] + example.completion
            for example in examples
        ]
    return {
        "input_ids": _padded(texts, lm.pad_token_id),
        "attention_mask": _padded([[1] * len(text) for text in texts], 0),
        "labels": _padded(labels, IGNORED),
    }


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def _language_model(model: Learner, tokenizer: Any, device: Any) -> LanguageModel:
    """What learns, out of what was given."""
    if isinstance(model, TextOnPolicyAlgorithm):
        model = model.policy
    if isinstance(model, LanguageModelPolicy):
        if tokenizer is not None:
            raise ValueError("tokenizer: the policy has its own; leave it out")
        lm = model.language_model
    else:
        lm = load_language_model(model, tokenizer=tokenizer, device=device)
    if not any(parameter.requires_grad for parameter in lm.model.parameters()):
        raise ValueError(
            f"all weights of the language model {lm.name} are frozen, as a reference's are; give its trainable_copy()"
        )
    return lm


def _rows(
    prompts: Any,
    completions: Sequence[str] | str,
    validation: Any,
    validation_share: float,
    seed: int,
    lm: LanguageModel,
) -> tuple[PromptRows, PromptRows | None, str]:
    """Rows to learn from and to measure on, and the column that has their completions."""
    rows = _fixed(prompts, lm, "prompts")
    column = COLUMN
    if isinstance(completions, str):
        column = completions
    else:
        if len(completions) != len(rows):
            raise ValueError(f"there are {len(completions)} completions of {len(rows)} prompts")
        both = zip(rows, completions, strict=True)
        rows = PromptRows([{**row.columns, "prompt": row.prompt, COLUMN: text} for row, text in both])
    if validation is not None:
        return rows, _fixed(validation, lm, "validation"), column
    if validation_share == 0:
        return rows, None, column
    training, held_out = split_prompts(rows, float(validation_share), seed)
    return training, held_out, column


def _fixed(source: Any, lm: LanguageModel, name: str) -> PromptRows:
    rows = as_prompt_source(source, lm.tokenizer)
    if not isinstance(rows, PromptRows):
        raise TypeError(
            f"{name} is a {type(rows).__name__}, which has no fixed rows: give a list, a data set or a file"
        )
    return rows


def _encode(
    lm: LanguageModel, rows: PromptRows, column: str, max_length: int | None, where: str, every: bool
) -> list[_Example]:
    """Token ids of prompts and completions.

    :param every: whether all answers of a conversation are learned
    """
    vocabulary = lm.vocabulary
    limit = _limit(vocabulary, max_length)
    examples, cut, unclear = [], 0, 0
    for i, row in enumerate(rows):
        text = row.columns.get(column)
        if not isinstance(text, str):
            given = f"it is {text!r}" if column in row.columns else f"the columns are {sorted(row.columns)}"
            raise ValueError(f"{where}[{i}] has no text in the column {column!r}: {given}")
        try:
            fitted = fit_prompt(row, vocabulary)
        except ValueError as error:
            raise ValueError(f"{where}[{i}]: {error}") from error
        try:
            end = vocabulary.end_after(fitted.ids)  # of the turn, where the prompt is a conversation
            completion = [*continuation_ids(vocabulary, fitted.ids, text), end]
        except ValueError as error:
            raise ValueError(f"{where}[{i}]: {error}") from error
        if limit is not None and len(fitted.ids) + len(completion) > limit:
            cut += 1
            completion = completion[: limit - 1]
            fitted = fit_prompt(row, vocabulary, limit - len(completion))
        mask = assistant_mask(fitted, vocabulary, row) if every else None
        unclear += every and mask is None
        examples.append(_Example(fitted.ids, completion, mask or [False] * len(fitted.ids)))
    if unclear:
        warnings.warn(
            f"of {unclear} of {len(examples)} conversations the chat template does not say which part the assistant "
            "wrote: their last answer alone is learned",
            stacklevel=3,
        )
    if cut:
        warnings.warn(f"{cut} of {len(examples)} rows are longer than {limit} tokens and were cut", stacklevel=3)
    return examples


def _limit(vocabulary: Vocabulary, max_length: int | None) -> int | None:
    """Most tokens of a row."""
    if max_length is None:
        return vocabulary.context_limit
    if vocabulary.context_limit is not None and max_length > vocabulary.context_limit:
        raise ValueError(f"max_length={max_length} is more than the model can read, {vocabulary.context_limit} tokens")
    return max_length


def _check_options(
    epochs: int,
    patience: int | None,
    batch_size: int,
    gradient_accumulation: int,
    validation_share: float,
    max_length: int | None,
) -> None:
    counts = {
        "epochs": epochs,
        "patience": patience,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
    }
    for name, count in counts.items():
        if count is not None or name != "patience":
            check_int(name, count, low=1)
    check_number("validation_share", validation_share, low=0.0, high=1.0)
    if max_length is not None:
        check_int("max_length", max_length, low=2)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"a warm start is made by one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")


def _free(folder: Path) -> Path:
    """:raises ValueError: if something is there already"""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={str(folder)!r} is there already; give a new directory")
    return folder


def _check_accelerate() -> None:
    try:
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'a warm start needs the package accelerate: pip install "textgym[accelerate]"', name="accelerate"
        ) from error

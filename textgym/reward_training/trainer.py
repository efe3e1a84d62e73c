"""The training loop: ``transformers.Trainer`` on row numbers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from textgym.checkpoint_folders import check_manifest, write_whole
from textgym.divergence import DivergedError
from textgym.engine.trunk import trunk_of

from .data import RewardData
from .encoding import EncodedText, end_positions, token_positions
from .objectives import Objective, joint_loss
from .options import RewardTrainingOptions
from .run_folder import TRAINER_STATE, checkpoint_of, remove_superfluous
from .scorer import TextScorer
from .trained_weights import WEIGHTS_FILE, load_trained, save_trained

MOST_REMEMBERED = 4 * 2**30  # bytes of a frozen backbone's states; of more data they are computed anew each epoch


class EncodedRows:
    """Rows as tokens and targets.

    - ``data``: the rows that there are; pairs whose two sides are the same tokens, also after they were cut, say
      nothing and are left out

    :raises ValueError: if a row has no tokens, or no row is left
    :warns UserWarning: if texts are cut or pairs left out, with their numbers
    """

    def __init__(self, data: RewardData, scorer: TextScorer) -> None:
        prompts = [row.prompt for row in data.rows]
        completions = [row.completion for row in data.rows]
        self.rejected: list[EncodedText] | None = None
        if data.kind == "preferences":
            pairs, cut = scorer.encode_pairs(prompts, completions, [row.rejected or "" for row in data.rows])
            kept = [i for i, (chosen, rejected) in enumerate(pairs) if chosen.ids != rejected.ids]
            self.texts, self.rejected = [pairs[i][0] for i in kept], [pairs[i][1] for i in kept]
            told = f"{cut} pairs are longer than {scorer.max_length} tokens and were cut, both sides alike"
            if len(kept) < len(pairs):
                equal = f"{len(pairs) - len(kept)} of {len(pairs)} pairs are the same tokens on both sides"
                if not kept:
                    raise ValueError(f"{equal}; there is nothing to learn. max_length={scorer.max_length} may be small")
                warnings.warn(f"{equal} and are left out", stacklevel=4)
                data = replace(data, rows=tuple(data.rows[i] for i in kept))
        else:
            self.texts, cut = scorer.encode(prompts, completions)
            told = f"{cut} texts are longer than {scorer.max_length} tokens and lose their beginning"
        if cut:
            warnings.warn(told, stacklevel=4)
        self.data = data
        self.targets = torch.tensor([row.target for row in data.rows])  # (N,)
        self.tasks = torch.tensor([row.task for row in data.rows])  # (N,)
        for row, texts in enumerate(zip(self.texts, self.rejected or self.texts, strict=True)):
            if any(not text.ids for text in texts):
                raise ValueError(f"row {row} has no tokens: {data.rows[row].completion!r:.60}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of all complete texts, rejected ones included."""
        return [text.ids for text in (*self.texts, *(self.rejected or ()))]


def training_arguments(
    options: RewardTrainingOptions, folder: Path, progress_bar: bool, device: str, resume: bool
) -> TrainingArguments:
    """What the options are called by ``transformers.Trainer``.

    :param folder: for checkpoints
    """
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=0.05,
        report_to="none",
        disable_tqdm=not progress_bar,
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=resume,
        dataloader_pin_memory=torch.cuda.is_available() and device != "cpu",
        use_cpu=device == "cpu",
        seed=options.seed,
        data_seed=options.seed,
    )


class RowsOfLikeLength(Sampler[int]):
    """Row numbers in an order in which batches have little padding.

    Shuffled, within stretches of some batches sorted by length, and the batches shuffled again. Each epoch has an
    order of its own, which depends on nothing but the seed and the epoch's number.

    :param lengths: ``(N,)`` tokens of each row
    :param batch_size: rows of a batch
    :param seed: of the order
    """

    STRETCH = 16  # batches that are sorted together; an eighth of all at most, or each epoch would have the same ones

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        batches_in_all = len(order) // self.batch_size
        stretch = max(1, min(self.STRETCH, batches_in_all // 8)) * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            rows = sorted(order[start : start + stretch], key=lambda row: self.lengths[row])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # A last batch that is not full stays the last: the loader counts rows, and would put together parts of two.
        full = [rows for rows in batches if len(rows) == self.batch_size]
        rest = [rows for rows in batches if len(rows) < self.batch_size]
        rng.shuffle(full)
        return (row for rows in (*full, *rest) for row in rows)


@dataclass
class _Points:
    """Places at which texts are scored: N of them over B rows."""

    rows: list[int] = field(default_factory=list)  # (N,) of the batch
    positions: list[int] = field(default_factory=list)  # (N,) token
    weights: list[float] = field(default_factory=list)  # (N,) 1 for each row in all
    whole: list[bool] = field(default_factory=list)  # (N,) whether the text ends there

    def add(self, row: int, prefixes: Sequence[int], ends: Sequence[int], prefix_weight: float) -> None:
        share = prefix_weight if prefixes else 0.0
        self.rows += [row] * (len(prefixes) + len(ends))
        self.positions += [*prefixes, *ends]
        self.weights += [share / len(prefixes) if prefixes else 0.0] * len(prefixes) + [(1 - share) / len(ends)] * len(
            ends
        )
        self.whole += [False] * len(prefixes) + [True] * len(ends)


class _BestCheckpoint(TrainerCallback):
    """Tells a resumed run where its best checkpoint is: the folder may have been moved since."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_of(self.checkpoints, state.best_global_step))


class RewardTrainer(Trainer):
    """``transformers.Trainer`` on row numbers; what is random is drawn in the step, where resuming repeats it."""

    def __init__(
        self,
        scorer: TextScorer,
        options: RewardTrainingOptions,
        objectives: Sequence[Objective],
        training: EncodedRows,
        validation: EncodedRows,
        arguments: TrainingArguments,
    ) -> None:
        if options.freeze_backbone:
            trunk_of(scorer.model).requires_grad_(False)
        self.checkpoints = Path(str(arguments.output_dir))
        callbacks: list[TrainerCallback] = [_BestCheckpoint(self.checkpoints)]
        if options.patience is not None:
            callbacks.append(EarlyStoppingCallback(options.patience))
        super().__init__(
            scorer.model,
            arguments,
            data_collator=lambda rows: {"row": torch.tensor(rows)},
            train_dataset=list(range(len(training))),
            eval_dataset=list(range(len(validation))),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # it prints every log where there is no progress bar
        self.model_accepts_loss_kwargs = False  # the loss is a mean over each batch, to be divided by their number
        self.scorer, self.options, self.objectives = scorer, options, tuple(objectives)
        self.training, self.validation = training, validation
        if options.freeze_backbone and options.prefixes != "random":  # prefixes drawn at random are new each time
            everywhere = options.prefixes == "all"
            ids = training.ids + validation.ids
            states = sum(map(len, ids)) if everywhere or scorer.convolutional else len(ids)
            if 4 * states * scorer.state_size <= MOST_REMEMBERED:
                scorer.remember(ids, everywhere)

    # Checkpoints: whole or not there, and compared with what was written when they are read

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the state after an epoch, and remove those that nobody goes back to any more.

        :raises CheckpointError: if it can't be written, for example because the disk is full
        """
        state = self.state
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                state.stateful_callbacks[type(part).__name__] = part.state()
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_of(self.checkpoints, state.best_global_step))
        write_whole(checkpoint_of(self.checkpoints, state.global_step), self._write)
        remove_superfluous(self.checkpoints)

    def _write(self, folder: Path) -> None:
        save_trained(self.scorer.model, folder / WEIGHTS_FILE)
        try:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
        except RuntimeError as error:  # what torch raises where a file can't be written
            raise OSError(str(error)) from error
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """:raises CheckpointError: if it is of other frozen weights"""
        load_trained(self.scorer.model, Path(resume_from_checkpoint) / WEIGHTS_FILE)

    def _load_best_model(self) -> None:
        """:raises CheckpointError: if it is not what was written"""
        best = Path(self.state.best_model_checkpoint or "")
        check_manifest(best)
        load_trained(self.scorer.model, best / WEIGHTS_FILE)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows, size = self.training, self.args.train_batch_size
        others = rows.rejected or rows.texts
        lengths = [max(len(text.ids), len(other.ids)) for text, other in zip(rows.texts, others, strict=True)]
        return RowsOfLikeLength(lengths, size, self.options.seed)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # it would be guessed from token ids, which the inputs are not

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        rows = self.training
        self.scorer.train()
        batch = inputs["row"].tolist()
        device = self.scorer.model.device
        texts = [rows.texts[i] for i in batch]
        rejected = None if rows.rejected is None else [rows.rejected[i] for i in batch]
        targets, tasks = rows.targets[batch].to(device), rows.tasks[batch].to(device)
        take = self._loss_everywhere if self.options.prefixes == "all" else self._loss_at_ends
        loss = take(texts, rejected, targets, tasks)
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()}", self.state.global_step + 1)
        return loss

    def _loss_at_ends(
        self, texts: list[EncodedText], rejected: list[EncodedText] | None, targets: Tensor, tasks: Tensor
    ) -> Tensor:
        options = self.options
        others = rejected or texts
        ids, other_ids, whole = [], [], []
        share = options.prefix_weight if options.prefixes == "random" else 0.0
        for text, other in zip(texts, others, strict=True):
            # A pair is cut after the same number of tokens; where one text ends there is nothing to compare any more.
            # Of a pair, the prompt alone says nothing.
            shortest = max(1, text.shortest, other.shortest) if rejected is not None else text.shortest
            longest = min(len(text.completion), len(other.completion)) - 1
            cut = bool(torch.rand(()) < share) and longest >= shortest
            length = int(torch.randint(shortest, longest + 1, ())) if cut else 0
            ids.append(text.prefix(length) if cut else text.ids)
            other_ids.append(other.prefix(length) if cut else other.ids)
            whole.append(not cut)
        logits = self.scorer.at_end(ids + other_ids if rejected is not None else ids)
        if rejected is not None:
            ended = torch.tensor(whole, device=logits.device)
            chosen, worse = logits.split(len(ids))
            return self.objectives[0].of_pairs(chosen, worse, targets * ended)
        return joint_loss(self.objectives, logits, targets, tasks, torch.ones_like(targets))

    def _loss_everywhere(
        self, texts: list[EncodedText], rejected: list[EncodedText] | None, targets: Tensor, tasks: Tensor
    ) -> Tensor:
        weight = self.options.prefix_weight
        points, others = _Points(), _Points()
        for i, text in enumerate(texts):
            if rejected is None:
                lengths = range(text.shortest, len(text.completion))
                points.add(i, token_positions(text, lengths), end_positions(text), weight)
                continue
            other = rejected[i]
            lengths = range(1, min(len(text.completion), len(other.completion)))
            ends = end_positions(text), end_positions(other)
            count = min(map(len, ends))
            points.add(i, token_positions(text, lengths), ends[0][-count:], weight)
            others.add(i + len(texts), token_positions(other, lengths), ends[1][-count:], weight)
        ids = [text.ids for text in (*texts, *(rejected or ()))]
        logits, _ = self.scorer.everywhere(ids)  # (B, L, C), of pairs (2B, L, C)
        at_points = logits[points.rows, points.positions]  # (N, C)
        weights = torch.tensor(points.weights, device=logits.device)
        targets, tasks = targets[points.rows], tasks[points.rows]
        if rejected is not None:
            worse = logits[others.rows, others.positions]
            margins = targets * torch.tensor(points.whole, device=logits.device)
            return self.objectives[0].of_pairs(at_points, worse, margins, weights)
        return joint_loss(self.objectives, at_points, targets, tasks, weights)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on whole validation texts, class weights included."""
        rows = self.validation
        logits = self.scorer.logits([text.ids for text in rows.texts])
        if rows.rejected is not None:
            worse = self.scorer.logits([text.ids for text in rows.rejected])
            loss = self.objectives[0].of_pairs(logits, worse, rows.targets)
        else:
            loss = joint_loss(self.objectives, logits, rows.targets, rows.tasks, torch.ones(len(rows)))
        if not torch.isfinite(loss):  # before the weights become a checkpoint
            raise DivergedError(f"the loss on validation rows is {loss.item()}", self.state.global_step)
        metrics = {f"{metric_key_prefix}_loss": loss.item()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

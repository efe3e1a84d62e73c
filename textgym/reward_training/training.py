"""Train a reward model, or an ensemble of them, with ``transformers.Trainer``.

The result is a directory that ``reward=`` of the environments takes. With a linear head
``AutoModelForSequenceClassification.from_pretrained`` opens it, too.

Scores of unfinished texts are what an environment pays after each token. A model that only ever saw whole texts has
never been told what to say of half of one, so a share of the loss lies on prefixes: their target is that of the whole
text, and the best guess of it is its mean over the ways in which the text may go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from textgym.chat.template_arguments import with_template_arguments
from textgym.checkpoint_folders import FolderLock
from textgym.checks import check_choice, check_int
from textgym.model_sources import quiet_progress

from .adapters import add_adapters, merge_adapters
from .backbone import open_backbone, open_tokenizer
from .data import Kind, RewardData, check_disjoint, number_of_prompts, split_by_prompt
from .measuring import Predictions, mean_predictions, predictions_of, report_of
from .objectives import describe_outputs
from .options import RewardTrainingOptions, fitting, resolved
from .reading import load_reward_data
from .report import RewardReport
from .run_folder import (
    OPTIONS_FILE,
    check_begun,
    check_free,
    check_resumable,
    check_same_run,
    forget_empty,
    is_finished,
    last_checkpoint,
    save_ensemble,
    save_model,
    write_record,
)
from .scorer import TextScorer
from .trainer import EncodedRows, RewardTrainer, training_arguments

Source = str | os.PathLike[str] | RewardData | Iterable[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the members of an ensemble share."""

    model: str | os.PathLike[str] | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    training: RewardData
    validation: RewardData  # the rows of ``training``, where none are held out
    held_out: bool
    progress_bar: bool
    device: Literal["auto", "cpu"]
    trust_remote_code: bool


def train_reward(
    data: Source,
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | PreTrainedModel = "embedded",
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: Source | None = None,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    members: int = 1,
    bootstrap: bool = False,
    resume: bool = False,
    progress_bar: bool = False,
    device: Literal["auto", "cpu"] = "auto",
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> RewardReport:
    """Train a reward model, and measure it on rows whose prompts it did not see.

    :param data: what to learn from, see :func:`~textgym.reward_training.load_reward_data`
    :param output: the directory that gets the model, its tokenizer, ``README.md``, ``report.json``, ``report.png`` and
        ``training.json``, and while it trains ``checkpoints/``; new or empty, except with ``resume``
    :param model: ``"embedded"`` (textgym's language model with a new head), ``"smollm2"``, ``"gemma3"``, ``"minilm"``,
        a directory, a hub id, or an object, which is trained in place: a sequence classifier, or with a head of its own
        any transformer
    :param tokenizer: by default the one saved with the model
    :param validation: data of the same kind; by default a part of ``data``, split by prompt. Where the
        share of the prompts is none, nothing is held out, with a warning, and the report is of the training rows
    :param kind: see :func:`~textgym.reward_training.load_reward_data`, as for ``columns``, ``classes`` and ``split``
    :param members: train so many, each in a directory ``member_0``, ``member_1``, ... of ``output``. They have the same
        split and differ in their seed: the head, the order of the rows and dropout
    :param bootstrap: draw the training rows of each member with replacement
    :param resume: go on with the run in ``output`` after its last checkpoint, with the same data and options
    :param progress_bar: show one
    :param device: ``"auto"`` is the GPU where there is one
    :param trust_remote_code: run Python code that comes with ``model``, where it or its tokenizer has some; the
        directory then has it, too, and opens where that is said again
    :param chat_template_kwargs: variables of the chat template and their values, such as
        ``{"enable_thinking": False}``; see :mod:`textgym.chat.template_arguments`
    :param options: those of :class:`RewardTrainingOptions`
    :return: the report; the model of the epoch with the smallest validation loss is what is measured and saved. Of an
        ensemble, that of the mean of its members
    :raises ValueError: if an option, the data or ``output`` does not fit
    :raises TypeError: if an option is unknown
    :raises FileNotFoundError: if data or a model directory is not there
    :raises ModuleNotFoundError: if accelerate is missing, which ``transformers.Trainer`` needs
    :raises FileExistsError: if another process is at work in ``output``
    :raises DivergedError: if a loss is not finite
    :raises CheckpointError: if a checkpoint can't be written, or none can be gone on from
    """
    known = {option.name for option in dataclasses.fields(RewardTrainingOptions)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"there is no option {unknown[0]!r}; options are {', '.join(sorted(known))}")
    check_choice("device", device, ("auto", "cpu"))
    check_int("members", members, low=1)
    if members > 1 and isinstance(model, PreTrainedModel):
        raise ValueError(f"members={members}: each starts from the model as it was; give a name or a directory")
    if bootstrap and members == 1:
        raise ValueError("bootstrap=True is for the members of an ensemble; give members=2 or more")
    _check_accelerate()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"reward models are trained by one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    given = RewardTrainingOptions(**options)
    template = tokenizer if tokenizer is not None else _tokenizer_of(model, trust_remote_code)
    if template is not None and chat_template_kwargs:
        template = tokenizer = with_template_arguments(template, chat_template_kwargs)
    training = load_reward_data(data, kind=kind, columns=columns, classes=classes, tokenizer=template, split=split)
    if validation is None:
        training, held_out = _held_out(training, given.validation_share, given.seed)
    else:
        held_out = load_reward_data(
            validation,
            kind=training.kind,
            columns=columns,
            classes=training.classes or None,
            tasks=training.several or None,
            tokenizer=template,
            name="validation",
        )
        check_disjoint(training, held_out)
    folder = Path(output).expanduser()
    run = _Run(model, tokenizer, training, held_out, held_out is not training, progress_bar, device, trust_remote_code)
    is_new = not folder.exists()
    lock = _taken(folder, resume)
    try:
        if members == 1:
            return _train(run, given, folder, resume)[0]
        return _train_ensemble(run, given, folder, resume, members, bootstrap)
    finally:
        lock.release()
        forget_empty(folder, is_new)


def _taken(folder: Path, resume: bool) -> FolderLock:
    """The folder, kept from other processes.

    :raises ValueError: if it holds something already, or, to be resumed, is not there
    :raises FileExistsError: if another process is at work in it
    """
    if not resume:
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        check_begun(folder)
    return FolderLock(folder)


def _held_out(data: RewardData, share: float, seed: int) -> tuple[RewardData, RewardData]:
    """Rows to train on and to measure on: the same ones where the share of the prompts is none."""
    prompts = number_of_prompts(data)
    if share > 0 and round(share * prompts) > 0:
        return split_by_prompt(data, share, seed)
    if share > 0:
        warnings.warn(
            f"validation_share={share} of {prompts} different prompts is none: all {len(data)} rows are trained on, "
            "and the report is of them. validation= measures on other rows",
            UserWarning,
            stacklevel=3,
        )
    return data, data


def _tokenizer_of(
    model: str | os.PathLike[str] | PreTrainedModel, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is opened by name, for the conversations of the data."""
    return None if isinstance(model, PreTrainedModel) else open_tokenizer(model, trust_remote_code)


def _train(
    run: _Run, given: RewardTrainingOptions, folder: Path, resume: bool
) -> tuple[RewardReport, dict[float, Predictions], RewardData]:
    """Train one model; its report, what it says of the validation rows, and those of them that were measured."""
    training, held_out = run.training, run.validation
    chosen, objectives = resolved(given, training)
    record = _record(run, chosen)
    if resume:
        check_resumable(folder, record)
    else:
        check_free(folder)
    outputs = sum(objective.outputs for objective in objectives)
    opened, tokenizer = open_backbone(
        run.model,
        run.tokenizer,
        outputs,
        chosen.seed,
        chosen.head,
        chosen.head_size,
        chosen.head_dropout,
        chosen.head_layers,
        run.trust_remote_code,
    )
    if chosen.lora_rank is not None:
        set_seed(chosen.seed)  # a model given as an object has drawn nothing by it yet
        add_adapters(opened, chosen.lora_rank)
    scorer = TextScorer(opened, tokenizer, chosen.max_length, frozen=chosen.freeze_backbone, bf16=chosen.bf16)
    chosen = fitting(chosen, scorer)
    describe_outputs(opened, tokenizer, objectives)
    rows = EncodedRows(training, scorer), EncodedRows(held_out, scorer)
    write_record(folder, record)

    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(chosen.seed)
    arguments = training_arguments(chosen, folder / "checkpoints", run.progress_bar, run.device, resume)
    trainer = RewardTrainer(scorer, chosen, objectives, *rows, arguments)
    # Each checkpoint would show bars of its own.
    with contextlib.nullcontext() if run.progress_bar else quiet_progress():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    predictions = predictions_of(scorer, objectives, rows[1])
    report = report_of(predictions, objectives, rows[1].data)
    report.seconds = time.monotonic() - started
    report.peak_memory_mib = _peak_memory(opened)
    report.rows = {"training": len(rows[0]), "validation": len(rows[1]) if run.held_out else 0}
    wanted = ("epoch", "loss", "eval_loss")
    report.history = [{key: entry[key] for key in wanted if key in entry} for entry in trainer.state.log_history]
    report.history = [entry for entry in report.history if len(entry) == 2]
    if chosen.lora_rank is not None:
        merge_adapters(opened)
    save_model(folder, opened, tokenizer, report)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run needs none, and they are large
    return report, predictions, rows[1].data


def _train_ensemble(
    run: _Run, given: RewardTrainingOptions, folder: Path, resume: bool, members: int, bootstrap: bool
) -> RewardReport:
    """Train the members one after the other; a resumed run trains those that are not finished."""
    resolved(given, run.training)  # what is wrong with the options is said before anything is written
    record = {**_record(run, given), "members": members, "bootstrap": bootstrap}
    if resume:
        check_resumable(folder, record)
    else:
        check_free(folder)
        write_record(folder, record)
    started = time.monotonic()
    found, reports = [], []
    for i in range(members):
        own = dataclasses.replace(given, seed=given.seed + i)
        rows = _drawn_again(run.training, own.seed) if bootstrap else run.training
        part, part_folder = dataclasses.replace(run, training=rows), folder / f"member_{i}"
        if resume and is_finished(part_folder):
            report, predictions, measured = _measured_again(part, own, part_folder)
        else:
            begun = resume and (part_folder / OPTIONS_FILE).is_file()
            report, predictions, measured = _train(part, own, part_folder, begun)
        found.append(predictions)
        reports.append(report)
    _, objectives = resolved(given, run.training)
    whole = report_of(mean_predictions(found), objectives, measured)
    whole.seconds = time.monotonic() - started
    whole.rows = {"training": len(run.training), "validation": len(run.validation) if run.held_out else 0}
    memories = [report.peak_memory_mib for report in reports if report.peak_memory_mib is not None]
    whole.peak_memory_mib = max(memories, default=None)
    whole.members = [report.metrics for report in reports]
    save_ensemble(folder, members, whole)
    return whole


def _measured_again(
    run: _Run, given: RewardTrainingOptions, folder: Path
) -> tuple[RewardReport, dict[float, Predictions], RewardData]:
    """What a member says that was trained before its ensemble's run was interrupted."""
    chosen, objectives = resolved(given, run.training)
    check_same_run(folder, _record(run, chosen))
    with quiet_progress():
        opened = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=run.trust_remote_code
        )
    opened.to("cpu" if run.device == "cpu" or not torch.cuda.is_available() else "cuda")
    scorer = TextScorer(opened, open_tokenizer(folder, run.trust_remote_code), chosen.max_length)
    rows = EncodedRows(run.validation, scorer)
    predictions = predictions_of(scorer, objectives, rows)
    return report_of(predictions, objectives, rows.data), predictions, rows.data


def _drawn_again(data: RewardData, seed: int) -> RewardData:
    """As many rows, drawn with replacement (bootstrap)."""
    return dataclasses.replace(data, rows=tuple(random.Random(seed).choices(data.rows, k=len(data))))


def _record(run: _Run, options: RewardTrainingOptions) -> dict[str, Any]:
    """By what a run is known when it is resumed."""
    model = run.model
    return {
        "model": os.fspath(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__,
        "options": dataclasses.asdict(options),
        "training_rows": run.training.fingerprint,
        "validation_rows": run.validation.fingerprint,
    }


def _check_accelerate() -> None:
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'training a reward model needs the package accelerate: pip install "textgym[rewards]"', name="accelerate"
        ) from error


def _peak_memory(model: PreTrainedModel) -> float | None:
    """MiB: of the GPU where the model is on one, else the largest the process has been."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

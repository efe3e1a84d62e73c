"""Train a reward model with ``transformers.Trainer``.

The result is a directory that ``AutoModelForSequenceClassification.from_pretrained`` opens. With a causal backbone and
one output, which is everything but labels of three classes or more, ``reward=`` of the environments takes it, too;
:class:`~textgym.rewards.ClassifierReward` reads all of them.

Scores of unfinished texts are what an environment pays after each token. A model that only ever saw whole texts has
never been told what to say of half of one, so a share of the loss lies on prefixes: their target is that of the whole
text, and the best guess of it is its mean over the ways in which the text may go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from textgym.language_model import quiet_progress
from textgym.rewards.causal import ACTIVATIONS, Activation

from .data import Kind, RewardData, check_disjoint, load_reward_data, split_by_prompt
from .losses import (
    LOSSES,
    LossName,
    binary_cross_entropy_loss,
    bradley_terry_loss,
    cross_entropy_loss,
    huber_loss,
    mse_loss,
)
from .models import EncodedText, TextScorer, open_backbone
from .report import (
    RewardReport,
    calibration_bins,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    regression_metrics,
)

Prefixes = Literal["none", "random", "all"]
PREFIX_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the completion's tokens, in the report
OPTIONS_FILE = "training.json"
_LOSSES_OF: dict[str, tuple[LossName, ...]] = {
    "preferences": ("bradley_terry",),
    "scores": ("mse", "huber"),
    "labels": ("bce", "cross_entropy"),
}


@dataclass(frozen=True)
class RewardTrainingOptions:
    """How a reward model is trained.

    :param loss: ``"bradley_terry"`` for preferences, ``"mse"`` (the default) or ``"huber"`` for scores, ``"bce"`` (the
        default of two classes) or ``"cross_entropy"`` for labels
    :param activation: what turns the one output into Φ: ``"identity"``, ``"tanh"`` or ``"sigmoid"``. Losses of scores
        are taken behind it. By default the sigmoid with ``"bce"``, otherwise the identity
    :param huber_delta: error from which the Huber loss is linear
    :param centring: coefficient of the squared sum of a pair's scores
    :param class_weights: ``"balanced"`` (inverse to how often a class occurs, 1 on average over the rows), or a weight
        for each class
    :param frozen: train the head only
    :param prefixes: ``"all"`` (every token of the completion, causal models only), ``"random"`` (rows are cut after a
        random token), or ``"none"``. By default ``"all"`` for causal models, otherwise ``"none"``
    :param prefix_weight: the share of the loss that lies on prefixes, for ``"random"`` the share of rows that are cut
    :param epochs: most passes over the training rows
    :param batch_size: rows (pairs count once) of a step
    :param gradient_accumulation: batches of a step
    :param learning_rate: by default 5e-5, and 1e-3 for a frozen backbone; it falls linearly to 0
    :param warmup: share of the steps in which the learning rate rises
    :param weight_decay: of AdamW
    :param patience: epochs without a smaller validation loss after which training ends; None for never
    :param validation_share: of the prompts, where no validation data is given
    :param max_length: most tokens of a text, see :class:`TextScorer`
    :param threshold: score above which a text counts as positive in the report; by default 0 where scores have both
        signs, otherwise the mean of the training scores
    :param seed: of the head, the split, the order of the rows and dropout
    :raises ValueError: if one is out of range
    """

    loss: LossName | None = None
    activation: Activation | None = None
    huber_delta: float = 1.0
    centring: float = 0.0
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    frozen: bool = False
    prefixes: Prefixes | None = None
    prefix_weight: float = 0.25
    epochs: int = 3
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    patience: int | None = 2
    validation_share: float = 0.1
    max_length: int | None = None
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss", LOSSES),
            ("activation", tuple(ACTIVATIONS)),
            ("prefixes", ("none", "random", "all")),
        ):
            if getattr(self, name) not in (None, *allowed):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "gradient_accumulation", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        for name in ("centring", "learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or a positive number, got {value!r}")
        if not 0 < self.huber_delta < math.inf:
            raise ValueError(f"huber_delta must be positive, got {self.huber_delta!r}")
        for name in ("prefix_weight", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be more than 0 and less than 1, got {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, from 0 to below 1, got {self.warmup!r}")


def train_reward(
    data: str | os.PathLike[str] | RewardData | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | PreTrainedModel = "embedded",
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: str | os.PathLike[str] | RewardData | Iterable[Mapping[str, Any]] | None = None,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    resume: bool = False,
    progress_bar: bool = False,
    device: Literal["auto", "cpu"] = "auto",
    **options: Any,
) -> RewardReport:
    """Train a reward model, and measure it on rows whose prompts it did not see.

    :param data: what to learn from, see :func:`~textgym.reward_training.load_reward_data`
    :param output: the directory that gets the model and its tokenizer, ``report.json``, ``report.png``,
        ``training.json`` and ``checkpoints/``; new or empty, except with ``resume``
    :param model: ``"embedded"`` (textgym's language model with a new head), ``"minilm"``, a directory, a hub id, or a
        sequence classifier, which is trained in place
    :param tokenizer: by default the one saved with the model
    :param validation: data of the same kind; by default a part of ``data``, split by prompt
    :param kind: see :func:`~textgym.reward_training.load_reward_data`, as for ``columns`` and ``classes``
    :param resume: go on with the run in ``output`` after its last checkpoint, with the same data and options
    :param progress_bar: show one
    :param device: ``"auto"`` is the GPU where there is one
    :param options: those of :class:`RewardTrainingOptions`
    :return: the report; the model of the epoch with the smallest validation loss is what is measured and saved
    :raises ValueError: if an option, the data or ``output`` does not fit
    :raises TypeError: if an option is unknown
    :raises FileNotFoundError: if data or a model directory is not there
    :raises ModuleNotFoundError: if accelerate is missing, which ``transformers.Trainer`` needs
    """
    known = {option.name for option in dataclasses.fields(RewardTrainingOptions)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"there is no option {unknown[0]!r}; options are {', '.join(sorted(known))}")
    if device not in ("auto", "cpu"):
        raise ValueError(f"device must be 'auto' or 'cpu', got {device!r}")
    _check_accelerate()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"reward models are trained by one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    given = RewardTrainingOptions(**options)
    training = load_reward_data(data, kind=kind, columns=columns, classes=classes)
    if validation is None:
        training, held_out = split_by_prompt(training, given.validation_share, given.seed)
    else:
        held_out = load_reward_data(
            validation,
            kind=training.kind,
            columns=columns,
            classes=training.classes or None,
            name="validation",
        )
        check_disjoint(training, held_out)
    chosen = _resolved(given, training)
    folder = Path(output).expanduser()
    record = {
        "model": os.fspath(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__,
        "options": dataclasses.asdict(chosen),
        "training_rows": training.fingerprint,
        "validation_rows": held_out.fingerprint,
    }
    checkpoint = _checkpoint_to_resume(folder, record) if resume else None
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={str(folder)!r} is there and not empty; name another folder, or pass resume=True")
    opened, tokenizer = open_backbone(model, tokenizer, _outputs(chosen, training), chosen.seed)
    scorer = TextScorer(opened, tokenizer, chosen.max_length)
    chosen = _fitting(chosen, scorer)
    _describe_head(opened, tokenizer, chosen, training)
    rows = _Rows(training, scorer, _class_weights(chosen, training)), _Rows(held_out, scorer, None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OPTIONS_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")

    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(chosen.seed)
    trainer = _RewardTrainer(
        scorer,
        chosen,
        *rows,
        _arguments(chosen, folder / "checkpoints", progress_bar, device, resume),
    )
    with contextlib.nullcontext() if progress_bar else quiet_progress():  # each checkpoint would show bars of its own
        trainer.train(resume_from_checkpoint=checkpoint)
    report = measured(scorer, held_out, chosen)
    report.seconds = time.monotonic() - started
    report.peak_memory_mib = _peak_memory(opened)
    report.rows = {"training": len(training), "validation": len(held_out)}
    wanted = ("epoch", "loss", "eval_loss")
    report.history = [{key: entry[key] for key in wanted if key in entry} for entry in trainer.state.log_history]
    report.history = [entry for entry in report.history if len(entry) == 2]
    opened.eval()
    with quiet_progress():
        opened.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report.save(folder)
    return report


def measured(scorer: TextScorer, data: RewardData, options: RewardTrainingOptions) -> RewardReport:
    """Measure a model on data, whole texts and their beginnings.

    :param options: complete ones: with a loss, an activation, and for scores a threshold
    """
    rows = _Rows(data, scorer, None)
    targets = np.array([row.target for row in data.rows])
    by_prefix = {}
    metrics: dict[str, float] = {}
    for share in PREFIX_SHARES:
        logits = scorer.logits([text.ids if share == 1 else text.prefix(_part(text, share)) for text in rows.texts])
        rejected = None
        if rows.rejected is not None:
            others = rows.rejected
            rejected = scorer.logits([t.ids if share == 1 else t.prefix(_part(t, share)) for t in others])
        metrics, calibration, confusion = _measures(data, options, logits, rejected, targets)
        shown = ("accuracy", "pearson", "calibration_error")
        by_prefix[f"{share:.0%}"] = {name: metrics[name] for name in shown if name in metrics}
    classes = list(data.classes) if data.kind == "labels" else ["below", "above"] if confusion else []
    return RewardReport(data.kind, metrics, by_prefix, confusion, classes, calibration)


def _part(text: EncodedText, share: float) -> int:
    return max(text.shortest, math.ceil(share * len(text.completion)))


def _measures(
    data: RewardData, options: RewardTrainingOptions, logits: Tensor, rejected: Tensor | None, targets: np.ndarray
) -> tuple[dict[str, float], list[tuple[float, float, int]], list[list[int]]]:
    """Metrics, calibration bins and confusion matrix."""
    if rejected is not None:
        chosen_scores, rejected_scores = logits[:, 0].double().numpy(), rejected[:, 0].double().numpy()
        difference = chosen_scores - rejected_scores
        right = difference > 0
        confidence = 1 / (1 + np.exp(-np.abs(difference)))
        metrics = {
            "accuracy": float(right.mean()),
            "mean_difference": float(difference.mean()),
            "calibration_error": expected_calibration_error(confidence, right),
        }
        if targets.std() > 0:  # margins
            correlations = regression_metrics(difference, targets)
            metrics |= {name: correlations[name] for name in ("pearson", "spearman") if name in correlations}
        return metrics, calibration_bins(confidence, right.astype(float)), []
    if data.kind == "labels":
        classes = targets.astype(np.int64)
        if options.loss == "bce":
            positive = torch.sigmoid(logits[:, 0].double()).numpy()
            probabilities = np.stack([1 - positive, positive], axis=1)
        else:
            probabilities = torch.softmax(logits.double(), 1).numpy()
        predicted = probabilities.argmax(1)
        bins = calibration_bins(probabilities.max(1), (predicted == classes).astype(float))
        matrix = confusion_matrix(classes, predicted, probabilities.shape[1])
        return classification_metrics(classes, probabilities), bins, matrix.tolist()
    scores = ACTIVATIONS[options.activation or "identity"](logits[:, 0].double()).numpy()
    threshold = options.threshold or 0.0
    above = (targets > threshold).astype(np.int64)
    by_sign = classification_metrics(above, np.stack([threshold - scores, scores - threshold], axis=1))
    del by_sign["calibration_error"]  # these were no probabilities
    matrix = confusion_matrix(above, (scores > threshold).astype(np.int64), 2)
    return by_sign | regression_metrics(scores, targets), calibration_bins(scores, targets), matrix.tolist()


# Options.


def _resolved(options: RewardTrainingOptions, data: RewardData) -> RewardTrainingOptions:
    """The options with what the data decides."""
    allowed = _LOSSES_OF[data.kind]
    loss = options.loss
    if loss is None:
        loss = "cross_entropy" if len(data.classes) > 2 else allowed[0]
    if loss not in allowed:
        raise ValueError(f"loss={loss!r} does not fit {data.kind}; give {' or '.join(map(repr, allowed))}")
    if loss == "bce" and len(data.classes) != 2:
        raise ValueError(f"loss='bce' needs two classes, the data has {len(data.classes)}; give 'cross_entropy'")
    if options.class_weights is not None and data.kind != "labels":
        raise ValueError(f"class_weights is for labels; the data has {data.kind}")
    activation = options.activation or ("sigmoid" if loss == "bce" else "identity")
    if activation != "identity" and loss in ("bradley_terry", "cross_entropy"):
        raise ValueError(f"activation={activation!r} does not fit loss={loss!r}, which is taken of the output itself")
    if activation == "tanh" and loss == "bce":
        raise ValueError("activation='tanh' does not fit loss='bce'; give 'sigmoid' (a probability) or 'identity'")
    threshold = options.threshold
    if data.kind == "scores":
        targets = np.array([row.target for row in data.rows])
        low, high = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}.get(activation, (-math.inf, math.inf))
        if targets.min() < low or targets.max() > high:
            raise ValueError(
                f"activation={activation!r} reaches from {low:g} to {high:g}, but scores are from {targets.min():g} to "
                f"{targets.max():g}; scale them, or use another activation"
            )
        if targets.min() == targets.max():
            raise ValueError(f"all scores of the training rows are {targets[0]:g}; there is nothing to learn")
        if threshold is None:
            threshold = 0.0 if targets.min() < 0 < targets.max() else float(targets.mean())
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = 1e-3 if options.frozen else 5e-5
    return dataclasses.replace(
        options, loss=loss, activation=activation, threshold=threshold, learning_rate=learning_rate
    )


def _fitting(options: RewardTrainingOptions, scorer: TextScorer) -> RewardTrainingOptions:
    """The options with what the model decides."""
    if options.prefixes == "all" and not scorer.causal:
        raise ValueError(
            f"prefixes='all' needs a causal model with a linear head 'score'; {type(scorer.model).__name__} is none. "
            "Give prefixes='random'"
        )
    if options.prefixes is not None:
        return options
    return dataclasses.replace(options, prefixes="all" if scorer.causal else "none")


def _outputs(options: RewardTrainingOptions, data: RewardData) -> int:
    return len(data.classes) if options.loss == "cross_entropy" else 1


def _class_weights(options: RewardTrainingOptions, data: RewardData) -> Tensor | None:
    """``(C,)``"""
    if options.class_weights is None:
        return None
    if options.class_weights == "balanced":
        counts = np.bincount([int(row.target) for row in data.rows], minlength=len(data.classes))
        if (counts == 0).any():
            missing = data.classes[int(np.argmin(counts))]
            raise ValueError(f"class_weights='balanced': no training row has the class {missing!r}")
        return torch.tensor(len(data) / (len(counts) * counts), dtype=torch.float32)
    if not isinstance(options.class_weights, Mapping) or set(options.class_weights) != set(data.classes):
        raise ValueError(
            f"class_weights must be 'balanced' or have a weight for each of the classes {', '.join(data.classes)}, "
            f"got {options.class_weights!r}"
        )
    weights = [options.class_weights[name] for name in data.classes]
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"class_weights must be positive numbers, got {options.class_weights!r}")
    return torch.tensor(weights, dtype=torch.float32)


def _describe_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: RewardTrainingOptions, data: RewardData
) -> None:
    """Write into the configuration what the outputs are."""
    config = model.config
    if options.loss == "cross_entropy":
        names, config.problem_type = list(data.classes), "single_label_classification"
    elif options.loss == "bce":
        names, config.problem_type = [data.classes[1]], "multi_label_classification"  # a sigmoid for each label
    else:
        names, config.problem_type = ["score"], "regression"
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    if options.loss != "cross_entropy":
        config.reward_activation = options.activation
    # transformers takes the last token that is not PAD for the end of a text; where PAD is EOS, as GPT-2's users have
    # it, it would pass over the EOS that was trained on. Without a PAD it reads one text at a time.
    pad = tokenizer.pad_token_id
    config.pad_token_id = None if pad == tokenizer.eos_token_id else pad


def _arguments(
    options: RewardTrainingOptions, folder: Path, progress_bar: bool, device: str, resume: bool
) -> TrainingArguments:
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
        save_total_limit=2,
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


def _checkpoint_to_resume(folder: Path, record: Mapping[str, Any]) -> str | None:
    """The last checkpoint of a run, None if it ended before its first."""
    path = folder / OPTIONS_FILE
    if not path.is_file():
        raise ValueError(f"resume=True: {str(folder)!r} has no {OPTIONS_FILE}, so it holds no run to go on with")
    if (folder / "report.json").exists():
        raise ValueError(f"resume=True: the run in {str(folder)!r} is finished")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"resume=True: {path} is broken JSON: {error}") from error
    now = json.loads(json.dumps(record))
    for name in now:
        if before.get(name) != now[name]:
            if name != "options":
                raise ValueError(f"resume=True: the run in {str(folder)!r} has other {name.replace('_', ' ')}")
            old = before.get(name) or {}
            option = next(key for key, value in now[name].items() if old.get(key) != value)
            raise ValueError(
                f"resume=True: the run in {str(folder)!r} has {option}={old.get(option)!r}, not {now[name][option]!r}"
            )
    checkpoints = folder / "checkpoints"
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


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


# Training.


class _Rows:
    """Rows as tokens, targets and class weights."""

    def __init__(self, data: RewardData, scorer: TextScorer, class_weights: Tensor | None) -> None:
        prompts = [row.prompt for row in data.rows]
        self.texts, cut = scorer.encode(prompts, [row.completion for row in data.rows])
        self.rejected: list[EncodedText] | None = None
        if data.kind == "preferences":
            self.rejected, also = scorer.encode(prompts, [row.rejected or "" for row in data.rows])
            cut += also
        if cut:
            warnings.warn(
                f"{cut} texts are longer than {scorer.max_length} tokens and lose their beginning", stacklevel=4
            )
        self.targets = torch.tensor([row.target for row in data.rows])  # (N,)
        self.class_weights = class_weights
        for row, texts in enumerate(zip(self.texts, self.rejected or self.texts, strict=True)):
            if any(not text.ids for text in texts):
                raise ValueError(f"row {row} has no tokens: {data.rows[row].completion!r:.60}")

    def __len__(self) -> int:
        return len(self.texts)


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


class _RewardTrainer(Trainer):
    """``transformers.Trainer`` on row numbers; what is random is drawn in the step, where resuming repeats it."""

    def __init__(
        self,
        scorer: TextScorer,
        options: RewardTrainingOptions,
        training: _Rows,
        validation: _Rows,
        arguments: TrainingArguments,
    ) -> None:
        if options.frozen:
            scorer.model.base_model.requires_grad_(False)
        callbacks = [] if options.patience is None else [EarlyStoppingCallback(options.patience)]
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
        self.scorer, self.options, self.training, self.validation = scorer, options, training, validation

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # it would be guessed from token ids, which the inputs are not

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        options, rows = self.options, self.training
        if options.frozen:
            self.scorer.model.base_model.eval()  # dropout in it would be noise and nothing else
        batch = inputs["row"].tolist()
        texts = [rows.texts[i] for i in batch]
        rejected = None if rows.rejected is None else [rows.rejected[i] for i in batch]
        targets = rows.targets[batch].to(self.scorer.model.device)
        if options.prefixes == "all":
            loss = self._loss_everywhere(texts, rejected, targets)
        else:
            loss = self._loss_at_ends(texts, rejected, targets)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; a smaller learning_rate than "
                f"{options.learning_rate} may help, or smaller targets"
            )
        return loss

    def _loss_at_ends(self, texts: list[EncodedText], rejected: list[EncodedText] | None, targets: Tensor) -> Tensor:
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
        logits = self.scorer.at_end(ids + other_ids if rejected is not None else ids, options.frozen)
        ended = torch.tensor(whole, device=logits.device)
        if rejected is not None:
            chosen, worse = logits[:, 0].split(len(ids))
            return bradley_terry_loss(chosen, worse, targets * ended, options.centring)
        return self._loss(logits, targets, torch.ones_like(targets))

    def _loss_everywhere(self, texts: list[EncodedText], rejected: list[EncodedText] | None, targets: Tensor) -> Tensor:
        options = self.options
        points, others = _Points(), _Points()
        for i, text in enumerate(texts):
            if rejected is None:
                lengths = range(text.shortest, len(text.completion))
                points.add(i, _places(text, lengths), _ends(text), options.prefix_weight)
                continue
            other = rejected[i]
            lengths = range(1, min(len(text.completion), len(other.completion)))
            ends = _ends(text), _ends(other)
            count = min(map(len, ends))
            points.add(i, _places(text, lengths), ends[0][-count:], options.prefix_weight)
            others.add(i + len(texts), _places(other, lengths), ends[1][-count:], options.prefix_weight)
        ids = [text.ids for text in (*texts, *(rejected or ()))]
        logits, _ = self.scorer.everywhere(ids, options.frozen)  # (B, L, C), of pairs (2B, L, C)
        at_points = logits[points.rows, points.positions]  # (N, C)
        weights = torch.tensor(points.weights, device=logits.device)
        targets = targets[points.rows]
        if rejected is not None:
            worse = logits[others.rows, others.positions]
            margins = targets * torch.tensor(points.whole, device=logits.device)
            return bradley_terry_loss(at_points[:, 0], worse[:, 0], margins, options.centring, weights)
        return self._loss(at_points, targets, weights)

    def _loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Loss of scores or labels.

        :param logits: ``(N, C)``
        :param targets: ``(N,)``
        :param weights: ``(N,)``
        """
        options, class_weights = self.options, self.training.class_weights
        if class_weights is not None:
            weights = weights * class_weights.to(weights.device)[targets.long()]
        if options.loss == "cross_entropy":
            return cross_entropy_loss(logits, targets.long(), weights)
        if options.loss == "bce":
            return binary_cross_entropy_loss(logits[:, 0], targets, weights)
        scores = ACTIVATIONS[options.activation or "identity"](logits[:, 0])
        if options.loss == "huber":
            return huber_loss(scores, targets, options.huber_delta, weights)
        return mse_loss(scores, targets, weights)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on whole validation texts, class weights included."""
        rows = self.validation
        logits = self.scorer.logits([text.ids for text in rows.texts])
        if rows.rejected is not None:
            worse = self.scorer.logits([text.ids for text in rows.rejected])
            loss = bradley_terry_loss(logits[:, 0], worse[:, 0], rows.targets, self.options.centring)
        else:
            loss = self._loss(logits, rows.targets, torch.ones(len(rows)))
        metrics = {f"{metric_key_prefix}_loss": loss.item()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _places(text: EncodedText, lengths: Iterable[int]) -> list[int]:
    """Positions of the last tokens of prefixes with so many tokens of the completion."""
    return [len(text.head) + length - 1 for length in lengths]


def _ends(text: EncodedText) -> list[int]:
    """Positions at which the text is complete: its last token, and the end-of-sequence token behind it."""
    last = len(text.ids) - 1
    content = len(text.head) + len(text.completion) - 1
    return [last] if content in (-1, last) else [content, last]

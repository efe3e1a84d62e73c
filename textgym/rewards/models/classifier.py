"""Any Hugging Face classifier of texts as a reward."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import Unpack

from textgym.chat.chat_prompts import MESSAGES
from textgym.chat.messages import is_conversation
from textgym.checks import check_choice
from textgym.encodable_text import well_formed
from textgym.engine.exactness import SteppedModel, Stepping
from textgym.handed_on import hands_on
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError
from textgym.rewards.models.causal import ACTIVATIONS
from textgym.rewards.models.own_template import OwnTemplate
from textgym.rewards.models.same_tokens import SameTokens
from textgym.rewards.models.text_forward import ForwardArguments, TextForward, open_pretrained
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import wanted_per_row
from textgym.vocabulary import is_encoder_decoder

Output = Literal["logit", "probability", "activation"]
Reads = Literal["text", "completion", "pair", "chat"]


@hands_on(TextForward)
class ClassifierReward(Reward):
    """Logit or probability of one label of a sequence classifier, encoder or causal, with any tokenizer.

    Φ is what ``model(**tokenizer(text))`` gives: the logit z_k without limits, or its probability from 0 to 1:
    σ(z) of a model with one output or of a ``multi_label_classification``, else softmax(z)_k; or what the model was
    trained to say, the logit after its configuration's ``reward_activation``. None where there is no token to read.

    Texts are read anew for every prefix, in batches. A causal model with a linear head called ``score`` that has the
    policy's tokens reads them directly (``reads="text"``, prefixes of at most ``max_length`` tokens): token by token
    with a cache, or all prefixes of a text in one pass. An end-of-sequence token is never read; for a model that was
    trained on texts with one there is :class:`~textgym.rewards.CausalRewardModel`.

    Texts longer than ``max_length`` tokens are cut on ``truncation_side``: by default on the left, which keeps what was
    written last; of a pair the longer text is cut. Rows are filled up with the ``pad_token_id`` of the model's
    configuration, so a tokenizer without PAD does no harm; a model whose configuration has none reads one text at a
    time. Further arguments are those of :class:`~textgym.rewards.models.text_forward.TextForward`.

    :param model: for example from ``AutoModelForSequenceClassification``; put in evaluation mode
    :param tokenizer: the model's tokenizer
    :param label: name or index of the label; may be left out where there is one only
    :param output: ``"logit"``, ``"probability"`` or ``"activation"``
    :param reads: ``"text"`` (prompt and completion as one text; conversations in the tokenizer's chat template,
        where it has one), ``"completion"``, ``"pair"`` (prompt and completion as
        the two segments of a pair) or ``"chat"`` (in the tokenizer's chat template: the conversation and the completion
        as the assistant's answer where the prompt rows have a column ``messages``, as prompts that are conversations
        do, else a user's message and the answer)
    :raises ValueError: if there is no such label, with those there are, or another parameter is out of range

    >>> from textgym.embedded import REWARD_MODEL
    >>> reward = ClassifierReward.from_pretrained(REWARD_MODEL)
    >>> score, = reward(prompts=["the film is"], completions=[" a warm and funny story."])
    >>> ids = reward.reader.tokenizer("the film is a warm and funny story.", return_tensors="pt")["input_ids"]
    >>> abs(score - reward.reader.model(input_ids=ids).logits.item()) < 1e-5
    True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | int | None = None,
        output: Output = "logit",
        reads: Reads = "text",
        **arguments: Unpack[ForwardArguments],
    ) -> None:
        check_choice("output", output, ("logit", "probability", "activation"))
        if output == "activation" and (activation_of(model) not in ACTIVATIONS):
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"reward_activation={activation_of(model)!r} in the configuration is none of {known}")
        check_choice("reads", reads, ("text", "completion", "pair", "chat"))
        if reads == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError("reads='chat' needs a tokenizer with a chat template, this one has none")
        self.label = label_index(model, label)
        self.reader = TextForward(model, tokenizer, **arguments)
        self.output = output
        self.reads = reads
        self._fitting = np.inf if self.reader.max_length is None else self.reader.max_length
        self._name = Path(model.name_or_path).name or type(model).__name__
        self._same_tokens = SameTokens(tokenizer, int(model.config.get_text_config().vocab_size))
        self._template = OwnTemplate(tokenizer, self._name)
        self._stepping: Stepping | None = None
        head = getattr(model, "score", None)
        ids = tokenizer("a")["input_ids"]
        one_text = reads == "text" and not is_encoder_decoder(model.config)  # and not one to encode, one to decode
        if one_text and isinstance(head, torch.nn.Linear) and ids[-1:] != [tokenizer.eos_token_id]:
            vocab_size = int(model.config.get_text_config().vocab_size)
            stepped = SteppedModel(model, f"reward={self._name}", vocab_size, lambda h: head(h), self._own_output)
            try:
                self._stepping = Stepping(stepped)
            except ValueError:  # its tokens see what comes after them: it is read as text
                self._stepping = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        **options: Any,
    ) -> ClassifierReward:
        """Open a classifier that was saved with ``save_pretrained``, or one on the Hugging Face hub.

        :param path: a directory, or a hub id
        :param tokenizer: by default the one saved with the model
        :param device: ``"auto"`` is the GPU where there is one, otherwise the CPU
        :param options: as in the class
        :raises FileNotFoundError: if ``path`` is written as a path and is not a directory
        :raises ValueError: if the checkpoint has no trained head; see also the class
        """
        kind = "a trained sequence classifier"
        model, tokenizer = open_pretrained(AutoModelForSequenceClassification, path, tokenizer, dtype, kind)
        return cls(model, tokenizer, device=device, **options)

    @property
    def name(self) -> str:
        return self._name

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if a score is not finite"""
        scores: list[float | None] = [None] * len(completions)
        for part, _, outputs in self.reader.run(self._encoded(prompts, completions, columns)):
            values = self._value(outputs.logits)  # (b,)
            for i, value in zip(part.tolist(), values.tolist(), strict=True):
                scores[i] = check_score(self.name, value, i, completions[i])
        return scores

    def potentials(self, batch: PrefixBatch) -> np.ndarray:
        """Φ of each prefix; see :meth:`Reward.potentials`."""
        if not self._reads_tokens_of(batch):
            return super().potentials(batch)
        ends = self._ends(batch, np.arange(len(batch)), batch.completion_lengths)
        scores = np.zeros(len(batch))
        fits = ends <= self._fitting
        for rows, read in ((np.flatnonzero(fits), self._stepped), (np.flatnonzero(~fits), super().potentials)):
            if len(rows):
                scores[rows] = read(batch.at(rows, batch.completion_lengths[rows]))
        return scores

    def prefix_potentials(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Φ of many prefixes of each row; see :meth:`Reward.prefix_potentials`."""
        counts = wanted_per_row(batch, at)
        if not self._reads_tokens_of(batch) or not sum(counts):
            return super().prefix_potentials(batch, at)
        owner = np.repeat(np.arange(len(batch)), counts)  # (K,) the row each prefix belongs to
        wanted = np.concatenate([np.asarray(lengths, dtype=np.int64) for lengths in at])  # (K,)
        wrong = np.flatnonzero((wanted < 0) | (wanted > batch.completion_lengths[owner]))
        if len(wrong):
            i = owner[wrong[0]]
            raise ValueError(f"at[{i}] is {at[i]}, but row {i} has {batch.completion_lengths[i]} completion tokens")
        ends = self._ends(batch, owner, wanted)
        fits = ends <= self._fitting
        scores = np.zeros(len(owner))
        scores[fits] = self._in_one_pass(batch, owner[fits], ends[fits])
        long = np.flatnonzero(~fits)
        for start in range(0, len(long), self.max_batch):
            part = long[start : start + self.max_batch]
            scores[part] = super().potentials(batch.at(owner[part], wanted[part]))
        return np.split(scores, np.cumsum(counts)[:-1])

    def forget(self, rows: np.ndarray) -> None:
        if self._stepping is not None:
            self._stepping.forget(rows)

    def _encoded(
        self, prompts: list[str], completions: list[str], columns: dict[str, Any]
    ) -> list[dict[str, list[Any]]]:
        if self.reads == "pair":
            return self.reader.encode(prompts, completions)
        if self.reads == "completion":
            return self.reader.encode(completions)
        if self.reads == "text":
            prompts = self._template.prompts(prompts, columns)
            return self.reader.encode([p + c for p, c in zip(prompts, completions, strict=True)])
        conversations = columns.get(MESSAGES)
        chats = [
            self._chat(prompt, completion, None if conversations is None else conversations[i], i)
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return self.reader.encode(chats, add_special_tokens=False)  # the template has written them

    def _chat(self, prompt: str, completion: str, conversation: Any, row: int) -> str:
        """Prompt and completion in the chat template of the classifier's tokenizer.

        :param conversation: the messages that the prompt was made of, if any
        :raises RewardError: if the template refuses them
        """
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        if is_conversation(conversation):
            messages = [{name: value for name, value in one.items() if value is not None} for one in conversation]
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""  # the completion goes on
        messages.append({"role": "assistant", "content": begun + completion})
        messages = [
            {name: well_formed(value) if isinstance(value, str) else value for name, value in one.items()}
            for one in messages
        ]
        from jinja2 import TemplateError

        try:
            text: str = self.reader.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            problem = f"its chat template refuses the conversation: {error}"
            raise RewardError(self.name, problem, row=row, completion=completion) from error
        return text

    def _value(self, logits: Tensor) -> np.ndarray:
        """Φ ``(N,)`` of logits ``(N, labels)``."""
        return label_values(self.reader.model, logits, self.label, self.output)

    def _reads_tokens_of(self, batch: PrefixBatch) -> bool:
        """Whether the batch's token ids can be read as they are."""
        return (
            self._stepping is not None
            and len(batch) > 0
            and int(batch.prompt_lengths.min()) > 0
            and self._same_tokens.of(batch)
            and self._template.is_of(batch)
        )

    @staticmethod
    def _ends(batch: PrefixBatch, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many tokens of prompt and completion are read, ``(K,)``: an end-of-sequence token is not."""
        ended = batch.finished[rows] & (lengths == batch.completion_lengths[rows])
        ends: np.ndarray = batch.prompt_lengths[rows] + lengths - ended
        return ends

    def _stepped(self, batch: PrefixBatch) -> np.ndarray:
        """Φ of each prefix, from the cache."""
        assert self._stepping is not None
        ends = self._ends(batch, np.arange(len(batch)), batch.completion_lengths)
        if len(np.unique(batch.rows)) < len(batch):  # several prefixes of one row can't share its slot
            return self._in_one_pass(batch, np.arange(len(batch)), ends)
        room = max(64, 1 << (int(ends.max()) - 1).bit_length())
        machine = self._stepping.machine(min(room, self.reader.max_length or room))
        return self._checked(self._head(machine.last_hidden(batch.input_ids, ends, batch.rows)), batch)

    def _in_one_pass(self, batch: PrefixBatch, owner: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Φ ``(K,)`` of the first ``ends`` tokens of given rows, from one teacher-forced pass over each row.

        :param owner: ``(K,)`` the row each prefix belongs to, in ascending order
        """
        assert self._stepping is not None
        scores = np.zeros(len(owner))
        needed = np.zeros(len(batch), dtype=np.int64)
        np.maximum.at(needed, owner, ends)
        machine = self._stepping.machine(1)
        read = [row[:length] for row, length in zip(batch.input_ids, needed, strict=True)]
        for part in machine.passes(read, self.reader.max_batch_tokens):
            chosen = np.flatnonzero(np.isin(owner, part))  # (K',)
            place = np.zeros(len(batch), dtype=np.int64)
            place[part] = np.arange(len(part))
            with torch.inference_mode():
                hidden = machine.hidden_at(
                    batch.input_ids[part], needed[part], place[owner[chosen]], ends[chosen] - 1
                )  # (K', H)
                scores[chosen] = self._head(hidden)
        return self._checked(scores, batch, owner)

    @torch.inference_mode()
    def _head(self, hidden: Tensor) -> np.ndarray:
        """Φ ``(N,)`` of hidden states ``(N, H)``."""
        return self._value(self.reader.model.score(hidden))

    def _own_output(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the model itself says of one row: ``(labels,)``."""
        mask = torch.ones_like(inputs["input_ids"])
        return self.reader.model(**inputs, attention_mask=mask, use_cache=False).logits[0]

    def _checked(self, scores: np.ndarray, batch: PrefixBatch, owner: np.ndarray | None = None) -> np.ndarray:
        for k in np.flatnonzero(~np.isfinite(scores)).tolist():
            i = k if owner is None else int(owner[k])
            check_score(self.name, float(scores[k]), int(batch.rows[i]), batch.completions[i])
        return scores


def label_index(model: PreTrainedModel, label: str | int | None) -> int:
    """Index of one of a classifier's labels.

    :param label: its name or index; None where there is one only
    :raises ValueError: if there is no such label or it is left open which, with those there are
    """
    names = {int(index): str(name) for index, name in model.config.id2label.items()}
    count = int(model.config.num_labels)
    known = ", ".join(f"{i} ({names[i]!r})" if i in names else str(i) for i in range(count))
    if label is None:
        if count == 1:
            return 0
        raise ValueError(f"{type(model).__name__} has {count} labels: give label=, one of {known}")
    if isinstance(label, str):
        found = [i for i in range(count) if names.get(i) == label]
        if len(found) != 1:
            raise ValueError(f"label {label!r} is not one of {known}")
        return found[0]
    if isinstance(label, bool) or not 0 <= label < count:
        raise ValueError(f"label {label!r} is not one of {known}")
    return int(label)


def activation_of(model: PreTrainedModel) -> str:
    """The configuration's ``reward_activation``; the identity where it has none."""
    return getattr(model.config, "reward_activation", None) or "identity"


def label_values(model: PreTrainedModel, logits: Tensor, label: int, output: Output) -> np.ndarray:
    """Logit, probability or activation of a label, ``(N,)`` float64, of logits ``(N, labels)``."""
    logits = logits.double()
    if output == "probability":
        several = model.config.problem_type == "multi_label_classification"
        logits = logits.sigmoid() if several or logits.shape[-1] == 1 else logits.softmax(-1)
    elif output == "activation":
        logits = ACTIVATIONS[activation_of(model)](logits)
    return logits[..., label].cpu().numpy()


def check_score(reward: str, score: float, row: int, completion: str) -> float:
    """:raises RewardError: if the score is not finite"""
    if not math.isfinite(score):
        problem = f"the score is {score}; the weights may be broken, or too large for their dtype"
        raise RewardError(reward, problem, row=row, completion=completion)
    return score

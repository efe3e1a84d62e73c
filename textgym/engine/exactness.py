"""How a language model can be stepped without changing its probabilities, found out by trying.

An architecture's name says little about what its code does with a cache, positions or padding. So a few tokens go
through the model the plain way and through the machinery when it is opened, and what differs is not used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from textgym.engine.cached_model import CachedModel
from textgym.engine.encoder_decoder import (
    CachedEncoderDecoder,
    EncoderDecoder,
    GroupedEncoderDecoder,
    GroupedPadTokensApart,
    PadTokensApart,
    model_inputs,
)
from textgym.engine.grouped_model import GroupedModel
from textgym.engine.prefix_model import PrefixModel
from textgym.engine.shared_weights import copy_sharing_weights
from textgym.engine.slot_cache import has_states
from textgym.engine.trunk import trunk_of
from textgym.vocabulary import context_limit, is_encoder_decoder, position_limit

TOKENS = 8  # of the rows that are tried; less where the model's context is shorter
PROMPT_TOKENS = np.array([3, 1])  # how many of these an encoder reads
WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk")  # what configurations call them
SMALL_WINDOW = 2
PAD_AT = [5, 4]  # where the rows have a padding token that belongs to the text, as sampling may draw it
PAD_IN_PROMPT = 1  # and where the first has one that an encoder reads
PART_AT = 2  # where rows that begin alike part
FAILURES = (
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    IndexError,
    KeyError,
    NotImplementedError,
    AssertionError,
)


Found: TypeAlias = "tuple[type[CachedModel], str | None]"  # a machinery, and why it is none with a cache


@dataclass(frozen=True)
class SteppedModel:
    """A model whose trunk is stepped and whose head textgym applies itself.

    - ``name``: what messages call it, such as ``language_model=embedded``
    - ``head``: what textgym makes of hidden states ``(..., H)``: ``(..., V)``
    - ``output``: what the model itself makes of one row at its last token, ``(V,)``, given what
      :func:`~textgym.engine.encoder_decoder.model_inputs` makes of it
    """

    model: PreTrainedModel
    name: str
    vocab_size: int
    head: Callable[[Tensor], Tensor]
    output: Callable[[dict[str, Tensor]], Tensor]

    @property
    def machines(self) -> tuple[type[CachedModel], ...]:
        """What may step it, from fast to slow; the last caches nothing and is exact where anything is."""
        if is_encoder_decoder(self.model.config):
            return CachedEncoderDecoder, GroupedEncoderDecoder, EncoderDecoder
        return CachedModel, GroupedModel, PrefixModel

    @property
    def machines_for_pad_tokens(self) -> tuple[type[CachedModel], ...]:
        """What may step it where those with a cache read padding tokens in the text otherwise than the model does."""
        return (PadTokensApart, GroupedPadTokensApart) if is_encoder_decoder(self.model.config) else ()


class Stepping:
    """Gives the machinery that steps a model exactly: with a slot cache where that can be, else by whole prefixes.

    :param stepped: the model
    :param like: of a model with the same architecture; what was found out about that one is not tried again
    :raises ValueError: if the model is none that predicts each token from those before it
    """

    def __init__(self, stepped: SteppedModel, like: Stepping | None = None) -> None:
        # whether the slot cache's decode steps are compiled, and teacher-forced passes with gradients
        self.compile: bool = False if like is None else like.compile
        self.compile_learning: bool = False if like is None else like.compile_learning
        self._stepped = stepped
        # For rows of any length, and for such as are longer than a window; the latter is found out when it is needed.
        self._found: dict[bool, Found] = {False: fast_machine(stepped)} if like is None else like._found
        self._machines: dict[bool, CachedModel] = {}
        self._told: set[str] = set() if like is None else like._told  # that it is slow, and why

    def machine(self, context: int) -> CachedModel:
        """The machinery for rows of at most ``context`` tokens.

        Where the slot cache would not give the model's own probabilities, it is a :class:`PrefixModel` or an
        :class:`EncoderDecoder`: as exact, but slower. A warning says so, once for a model and its copies.

        :raises ValueError: if the model was not built for so many tokens
        """
        stepped, limit = self._stepped, context_limit(self._stepped.model.config)
        positions = position_limit(stepped.model.config)
        beyond = limit is not None and context > limit and limit != positions
        if beyond not in self._found:
            self._found[beyond] = machine_beyond_windows(stepped)
        kind, reason = self._found[beyond]
        machine = self._machines.get(beyond)
        if machine is not None and machine.context < context:
            machine.widen(context)
        elif machine is None:
            if kind is CachedModel:
                machine = CachedModel(stepped.model, context, self.compile, self.compile_learning)
            else:
                machine = kind(stepped.model, context)
            self._machines[beyond] = machine
        if reason is not None and not self._told:
            self._told.add(reason)
            warnings.warn(
                f"{stepped.name}: every new token of {type(stepped.model).__name__} costs a forward over the whole "
                f"text before it, which is exact but slow: {reason}",
                stacklevel=3,
            )
        return machine

    def set_compile(self, decoding: bool, learning: bool) -> None:
        """Compile the decode steps and teacher-forced passes with gradients from now on, or no longer.

        :raises ValueError: if that is not available for the model
        """
        if (decoding, learning) == (self.compile, self.compile_learning):
            return
        if (decoding or learning) and is_encoder_decoder(self._stepped.model.config):
            raise ValueError(
                f"compile=True: {self._stepped.name} is an encoder-decoder ({type(self._stepped.model).__name__}), "
                "whose decode steps change shape with the prompts; leave it False"
            )
        kind, reason = self._found[False]
        if (decoding or learning) and kind is not CachedModel:
            name = type(self._stepped.model).__name__
            why = reason or "only rows of the same length step together, in forwards of ever other shapes"
            raise ValueError(
                f"compile=True: {self._stepped.name} ({name}) is not stepped with one forward for all rows, and "
                f"nothing else is compiled: {why}; leave it False"
            )
        if (decoding or learning) and has_states(self._stepped.model.config):
            raise ValueError(
                f"compile=True: layers of {self._stepped.name} ({type(self._stepped.model).__name__}) keep a state "
                "of each text, and only steps with keys and values are compiled; leave it False"
            )
        self.compile, self.compile_learning = decoding, learning
        self._machines.clear()

    def forget(self, rows: np.ndarray | None = None) -> None:
        """Drop what is cached, of some rows or of all."""
        for machine in self._machines.values():
            machine.forget(rows)


@torch.no_grad()
def fast_machine(stepped: SteppedModel) -> Found:
    """The fastest machinery that gives this model's own probabilities, and why none with a slot cache does, or None.

    This goes for rows in which each token sees all before it; see :func:`machine_beyond_windows`.

    :raises ValueError: if the model is none that predicts each token from those before it, or does more to its
        last hidden states than a linear layer
    """
    limit = context_limit(stepped.model.config)
    plain = check_prefixes(stepped, limit)  # (S, 2, H)
    ids, stages = _rows(stepped, limit)
    last = model_inputs(stepped.model, ids[1:, : stages[-1, 1]], int(PROMPT_TOKENS[1]))
    expected = stepped.output(last).float()  # (V,)
    logits = stepped.head(plain)  # (S, 2, V)
    error = _largest(logits[-1, 1] - expected)
    if not error <= _tolerance(stepped, expected):
        raise ValueError(
            f"{stepped.name}: the logits of {type(stepped.model).__name__} differ by {error:.2g} from its output "
            f"layer applied to its last hidden states, and textgym computes them that way; use {_wanted(stepped)} "
            "model without further layers after the last"
        )
    return _fastest(stepped, plain, ids, stages)


@torch.no_grad()
def machine_beyond_windows(stepped: SteppedModel) -> Found:
    """The same for rows that are longer than a window or chunk of the model's attention.

    A window of thousands of tokens is too long to try. So it is the model with a window of two tokens that is tried:
    the code is the same. Where a model does not heed what its configuration says, as when it made its masks when it
    was built, that would show nothing, and rows are stepped by whole prefixes.
    """
    small = with_windows(stepped.model, SMALL_WINDOW)
    limit = position_limit(stepped.model.config)
    tried = replace(stepped, model=small)
    ids, stages = _rows(tried, limit)
    plain = check_prefixes(tried, limit)
    wide = _each_alone(with_windows(stepped.model, ids.shape[1]), ids, stages).to(stepped.model.dtype)
    if not _largest(plain - wide) > 2 * _tolerance(stepped, plain):
        window = context_limit(stepped.model.config)
        return stepped.machines[-1], f"what it does beyond its attention window of {window} tokens can't be tried"
    return _fastest(tried, plain, ids, stages)


def with_windows(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    """A copy over the same weights whose windows and chunks of attention are so many tokens long."""
    small = copy_sharing_weights(model)
    for module in small.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in WINDOWS:
                if isinstance(getattr(owner, name, None), int):
                    setattr(owner, name, tokens)
    return small


def _fastest(stepped: SteppedModel, plain: Tensor, ids: Tensor, stages: np.ndarray) -> Found:
    """The first machinery whose logits are those of plain forwards, and why none with a slot cache is, or None.

    :param plain: ``(S, 2, H)`` hidden states of the plain forwards
    """
    slow = stepped.machines[-1]
    if _limits_time_steps(stepped.model):
        return slow, "with a state it forgets its time_step_limit, as transformers applies that to whole texts only"
    machine, reason = _first_exact(stepped, stepped.machines[:-1], plain, ids, stages)
    if machine is None and stepped.machines_for_pad_tokens:
        plain_text = _without_pads(stepped, ids)
        states = _each_alone(stepped.model, plain_text, stages).to(stepped.model.dtype)
        machine, _ = _first_exact(stepped, stepped.machines_for_pad_tokens, states, plain_text, stages)
    return (slow, reason) if machine is None else (machine, None)


def _first_exact(
    stepped: SteppedModel, machines: Sequence[type[CachedModel]], plain: Tensor, ids: Tensor, stages: np.ndarray
) -> tuple[type[CachedModel] | None, str | None]:
    """The first machinery whose logits are those of plain forwards, or None and what is wrong with the last."""
    logits = stepped.head(plain)  # (S, 2, V)
    reason = None
    for machine in machines:
        try:
            # Some models note in their modules what they did with a cache, and would read it in the next forward.
            stepper = machine(copy_sharing_weights(stepped.model), ids.shape[1])
            cached = torch.stack([stepped.head(_last_hidden(stepper, ids, lengths)) for lengths in stages])
            forced = torch.stack([stepped.head(hidden) for hidden in _forced(stepper, ids, stages)])
            packed = torch.stack([stepped.head(_packed(stepper, ids, lengths)) for lengths in stages])
        except FAILURES as e:
            reason = f"a cache of keys and values can't drive it ({type(e).__name__}: {first_line(e)})"
            continue
        error = _largest(torch.stack([cached - logits, forced - logits, packed - logits]))
        if error <= _tolerance(stepped, logits):
            return machine, None
        reason = f"with a cache of keys and values its logits differ by {error:.2g} from its plain forward"
    return None, reason


def _limits_time_steps(model: PreTrainedModel) -> bool:
    """Whether a layer of Mamba-2's kind keeps its time steps within bounds, which a few tokens may never reach."""
    limits = [getattr(module, "time_step_limit", None) for module in model.modules()]
    return any(tuple(limit) != (0.0, float("inf")) for limit in limits if limit is not None)


@torch.no_grad()
def check_prefixes(stepped: SteppedModel, limit: int | None) -> Tensor:
    """Make sure that forwards of rows padded on the right give the model's own hidden states at their real tokens.

    :param limit: most tokens of a row
    :return: ``(S, 2, H)`` the hidden states that were compared, from forwards of one row each
    :raises ValueError: if they don't
    """
    kind, advice = type(stepped.model).__name__, f"textgym needs {_wanted(stepped)} language model"
    if "lsh" in (getattr(stepped.model.config, "attn_layers", None) or ()):
        # Rows of more than one chunk show it, and those that are tried here are shorter.
        raise ValueError(
            f"{stepped.name}: the 'lsh' layers of {kind} hash tokens at random, so that its probabilities differ from "
            f"one forward to the next; {advice} without them"
        )
    ids, stages = _rows(stepped, limit)
    try:
        stepper = stepped.machines[-1](stepped.model, ids.shape[1])
        prefixes = torch.stack([_last_hidden(stepper, ids, lengths) for lengths in stages]).float()  # (S, 2, H)
        forced = _forced(stepper, ids, stages).float()
        plain = _each_alone(stepped.model, ids, stages)
    except FAILURES as e:
        raise ValueError(
            f"{stepped.name}: {kind} can't be run on token ids alone ({type(e).__name__}: {first_line(e)}); {advice}"
        ) from e
    error = _largest(torch.stack([prefixes - plain, forced - plain]))
    if not error <= _tolerance(stepped, plain):
        raise ValueError(
            f"{stepped.name}: the hidden states of {kind} change by {error:.2g} when tokens follow, as in "
            f"an encoder-only model such as BERT; {advice}"
        )
    return plain.to(stepped.model.dtype)


def _rows(stepped: SteppedModel, limit: int | None) -> tuple[Tensor, np.ndarray]:
    """Two rows of random tokens ``(2, L)``, and the lengths ``(S, 2)`` they have at each stage of a rollout."""
    least = PROMPT_TOKENS if is_encoder_decoder(stepped.model.config) else np.ones(2, dtype=int)
    longest = TOKENS if limit is None else max(min(limit, TOKENS), int(least.max()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, stepped.vocab_size, (2, longest), generator=generator).to(stepped.model.device)
    ids, pads = _without_pads(stepped, ids), _pads(stepped)
    if longest == TOKENS:
        # Some models don't count such a token as a position or don't show it to others, without a cache or with one. It
        # isn't the last of a stage: a sequence classifier looks for the last token that is none.
        for pad in pads:
            ids[[0, 1], PAD_AT] = pad
            if is_encoder_decoder(stepped.model.config):
                ids[0, PAD_IN_PROMPT] = pad
    # Two rows are begun, then go on from different places with different numbers of tokens, then with one each.
    stages = np.array([[longest - 3, 1], [longest - 1, longest - 2], [longest, longest - 1]])
    return ids, stages.clip(least, longest)


def _pads(stepped: SteppedModel) -> list[int]:
    """The padding token, where there is one in the vocabulary."""
    pad = getattr(stepped.model.config.get_text_config(), "pad_token_id", None)
    return [pad] if pad is not None and pad < stepped.vocab_size else []


def _without_pads(stepped: SteppedModel, ids: Tensor) -> Tensor:
    """The same rows with other tokens in the places of padding tokens."""
    ids = ids.clone()
    for pad in _pads(stepped):
        ids[ids == pad] = (pad + 1) % stepped.vocab_size
    return ids


def _wanted(stepped: SteppedModel) -> str:
    return "an encoder-decoder" if is_encoder_decoder(stepped.model.config) else "a causal (decoder-only)"


def _last_hidden(stepper: CachedModel, ids: Tensor, lengths: np.ndarray) -> Tensor:
    return stepper.last_hidden(ids, lengths, prompt_lengths=PROMPT_TOKENS)


def _forced(stepper: CachedModel, ids: Tensor, stages: np.ndarray) -> Tensor:
    """Hidden states at the last tokens of each stage, ``(S, 2, H)``, from one pass over both rows."""
    whole = stepper.hidden_states(ids, prompt_lengths=PROMPT_TOKENS)  # (2, L, H)
    return torch.stack([whole[[0, 1], lengths - 1] for lengths in stages])


def _packed(stepper: CachedModel, ids: Tensor, lengths: np.ndarray) -> Tensor:
    """Hidden states ``(2, H)`` at the last tokens of the two rows, packed with others that begin as the first does."""
    four = torch.cat([ids, ids[:1], ids[:1]])
    four[3, PART_AT:] = ids[1, PART_AT:]
    return stepper.packed_hidden_at(
        four, np.array([*lengths, *four.shape[1:] * 2]), np.arange(2), lengths - 1, PROMPT_TOKENS[[0, 1, 0, 0]]
    )


def _each_alone(model: PreTrainedModel, ids: Tensor, stages: np.ndarray) -> Tensor:
    """Hidden states at the last token of each row, ``(S, 2, H)``; no padding, no cache, one row at a time."""
    parts = [
        own_states(model, model_inputs(model, ids[row : row + 1, :length], int(PROMPT_TOKENS[row])))[0, -1]
        for lengths in stages.tolist()
        for row, length in enumerate(lengths)
    ]
    return torch.stack(parts).view(len(stages), 2, -1).float()


def own_states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states of a model's own forward, of the decoder where there are two."""
    if not is_encoder_decoder(model.config):
        return trunk_of(model)(**inputs, use_cache=False).last_hidden_state
    # T5's language model is its own base model, and hands out these states in another place than others.
    # Asked for them, transformers puts hooks into the modules that can't be pickled: hence the copy.
    output = trunk_of(copy_sharing_weights(model))(**inputs, use_cache=False, output_hidden_states=True)
    return output.decoder_hidden_states[-1]


def _tolerance(stepped: SteppedModel, values: Tensor) -> float:
    """Rounding differs between forwards of different shapes; a wrong mask or position shows in the first digit."""
    return relative_tolerance(stepped.model.dtype) * float(values.abs().max())


def relative_tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute the same may differ, relative to the largest number."""
    if dtype != torch.float32:
        return 5e-2
    return 3e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-2  # TF32 and the like: three digits


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def first_line(error: Exception) -> str:
    """The first line of an error message without its last mark, for putting it into another."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")

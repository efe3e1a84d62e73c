"""A language model as a Stable-Baselines3 policy: next-token distribution and value from one transformer.

Acting uses the slot cache of :mod:`textgym.engine.cached_model`: row i of a batch lives in slot i, so a step of an
environment costs one token per row. Learning uses :meth:`LanguageModelPolicy.evaluate_segments`, one
teacher-forced forward over whole segments of episodes. Both read the same hidden states, divided by the same
temperature and without dropout, so that their log-probs agree.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.agents.policy.acting_copy import ActingCopy
from textgym.agents.policy.blueprint import LanguageModelBlueprint
from textgym.agents.policy.gradient_checkpointing import check_checkpointable, checkpointed
from textgym.agents.policy.observations import Observation, as_mask, check_keys, check_model, check_spaces, read_tokens
from textgym.agents.policy.optimizer_arguments import optimizer_arguments
from textgym.agents.policy.precision import PLAIN_ATTENTION, autocast, autocast_name, dtype_name
from textgym.agents.policy.text_writer import TextWriter
from textgym.agents.policy.value_head import VALUE_HEADS, VALUE_TRUNKS, new_value_net
from textgym.checks import check_bool, check_choice, check_temperature
from textgym.engine.cached_model import CachedModel
from textgym.envs.segments import Segment
from textgym.generation import sample_tokens
from textgym.language_model import LanguageModel, load_language_model, log_distribution
from textgym.lora import Lora, add_lora, lora_options, wants_lora
from textgym.model_sources import resolve_dtype
from textgym.sampling import SamplingSettings
from textgym.vocabulary import is_encoder_decoder


class LanguageModelPolicy(TextWriter, ActorCriticPolicy):
    """A language model with a value head on its last hidden states.

    Observations are the environment's: ``input_ids`` ``(B, L)`` right-padded and ``attention_mask`` ``(B,
    L)``; an encoder-decoder, whose value head is on the decoder, reads ``prompt_length`` ``(B, 1)``, too.
    Values have SB3's shape ``(B, 1)``, log-probs and entropies ``(B,)``, in nats.

    :param observation_space: ``Dict`` with ``input_ids`` ``(L,)`` and ``attention_mask`` ``(L,)``
    :param action_space: ``Discrete(V)``, V the number of tokens the model has logits for
    :param lr_schedule: learning rate as a function of the remaining progress, 1 to 0
    :param use_sde: not available (it needs continuous actions)
    :param language_model: whatever :func:`~textgym.language_model.load_language_model` opens, or a blueprint.
        A model object is trained in place: pass a copy if it is also the environment's reference
    :param tokenizer: another tokenizer than the model's own
    :param temperature: logits are divided by it, when acting and when learning
    :param sampling: how :meth:`generate` samples unless told otherwise, an agent's policy as its environment does;
        its temperature is ``temperature``
    :param value_head: ``"linear"``, or ``"mlp"`` with one hidden layer; both start as V = 0
    :param value_trunk: ``"shared"`` lets the value loss train the transformer too, ``"detached"`` only the
        value head
    :param lora: train a low-rank adapter and the value head, and leave the weights as they are: True for the defaults,
        or arguments of ``peft.LoraConfig``, see :func:`textgym.lora.add_lora`. A model object keeps its weights and
        shares them with the policy. Needs ``pip install "textgym[lora]"``
    :param dtype: type of the trained weights; by default they stay as they are. Where the environment's models are
        bfloat16, float32 lets small updates add up
    :param autocast: ``"bfloat16"`` or ``"float16"``: learning computes matrix products in that type, from weights that
        stay as they are (``torch.autocast``)
    :param gradient_checkpointing: learning keeps no activations inside the transformer's blocks and computes them
        again: less memory, a third more time
    :param rollout_dtype: acting uses a copy of the weights in that type, such as ``"bfloat16"``; see
        :mod:`textgym.agents.policy.acting_copy`
    :param compile: acting runs through ``torch.compile``, and learning where it keeps its activations (no
        ``gradient_checkpointing``): the first steps and the first update take up to some minutes, the others less time
    :param optimizer_class: Adam by default, with eps = 1e-5, fused where torch has that
    :param optimizer_kwargs: its keyword arguments, except the learning rate
    :raises ValueError: if the spaces aren't those of a text environment, or the model does not fit them
    """

    observation_space: spaces.Dict
    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        language_model: str | Path | PreTrainedModel | LanguageModel | LanguageModelBlueprint = "embedded",
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        temperature: float = 1.0,
        sampling: SamplingSettings | Mapping[str, Any] | None = None,
        value_head: str = "linear",
        value_trunk: str = "shared",
        lora: Lora = None,
        dtype: str | torch.dtype | None = None,
        autocast: str | torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        rollout_dtype: str | torch.dtype | None = None,
        compile: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde=True needs continuous actions; tokens are discrete, leave it False")
        check_temperature("temperature", temperature)
        check_choice("value_head", value_head, VALUE_HEADS)
        check_choice("value_trunk", value_trunk, VALUE_TRUNKS)
        check_spaces(observation_space, action_space)
        for name, value in (("compile", compile), ("gradient_checkpointing", gradient_checkpointing)):
            check_bool(name, value)
        self.gradient_checkpointing = gradient_checkpointing
        self.autocast = autocast_name(autocast)
        self.rollout_dtype = dtype_name(rollout_dtype)
        self.compile_model = compile
        self._acting_copy: ActingCopy | None = None
        if isinstance(language_model, LanguageModelBlueprint):
            language_model = language_model.build()
        # What _build needs must be there before the base class calls it.
        self.language_model = load_language_model(language_model, tokenizer=tokenizer)
        self.lora = lora_options(lora) if wants_lora(lora) else None
        if self.lora is not None:
            if dtype is not None:
                raise ValueError(
                    f"dtype={dtype!r} with lora: the weights are the reference model's and stay as they are"
                )
            self.language_model = add_lora(self.language_model, self.lora)
        elif dtype is not None:
            self.language_model.model.to(resolve_dtype(dtype))
        self.temperature = float(temperature)
        if not isinstance(sampling, SamplingSettings):
            sampling = SamplingSettings.from_dict({} if sampling is None else sampling)
        self.sampling = dataclasses.replace(sampling, temperature=self.temperature)
        self.value_head = value_head
        self.value_trunk = value_trunk
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_arguments(optimizer_class, optimizer_kwargs),
        )

    def _build(self, lr_schedule: Schedule) -> None:
        """Register the transformer, make the value head and the optimizer."""
        model = self.language_model.model
        check_model(self.language_model, self.observation_space, self.action_space)
        if self.gradient_checkpointing:
            check_checkpointable(model)
        self.context = int(self.observation_space["input_ids"].shape[0])  # type: ignore[index]
        self.language_model.compile(
            decoding=self.compile_model and self.rollout_dtype is None,
            learning=self.compile_model and not self.gradient_checkpointing,
        )
        self.language_model.cached(self.context)  # raises now if the model's context is too short
        self.transformer = model
        self.value_net = new_value_net(self.value_head, self.language_model.hidden_size).to(model.device)  # type: ignore[assignment]
        self.eval()
        trainable = [p for p in self.parameters() if p.requires_grad or self.lora is None]
        self.optimizer = self.optimizer_class(
            trainable,
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def train(self, mode: bool = True) -> LanguageModelPolicy:
        """Stay in evaluation mode: dropout would make the ratio of new to old probabilities noise from the
        start."""
        super().train(False)
        return self

    # Acting

    @torch.no_grad()
    def forward(
        self,
        obs: Observation,
        deterministic: bool = False,
        action_masks: np.ndarray | Tensor | None = None,
        rows: np.ndarray | None = None,
        behaviour: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of each row, from cached states and without gradients.

        :param obs: observations of B rows
        :param deterministic: whether to take the most likely token
        :param action_masks: ``(B, V)`` bool; other tokens can't be chosen, and the probabilities are
            renormalised
        :param rows: ``(B,)`` cache slots the rows live in; default 0 to B-1
        :param behaviour: makes the log-probs ``(B, V)`` that tokens are drawn from of the policy's own; those returned
            are the policy's all the same
        :return: actions ``(B,)``, values ``(B, 1)`` and log-probs ``(B,)``
        """
        hidden = self._cached_hidden(obs, rows)  # (B, H)
        log_probs = self._log_distribution(self.acting_model, hidden, action_masks)  # (B, V)
        drawn_from = log_probs if behaviour is None else behaviour(log_probs)
        actions = drawn_from.argmax(-1) if deterministic else sample_tokens(drawn_from)
        return actions, self._values(hidden), log_probs.gather(1, actions[:, None]).squeeze(1)

    def _predict(
        self,
        observation: Observation,
        deterministic: bool = False,
        action_masks: np.ndarray | Tensor | None = None,
    ) -> Tensor:
        return self.forward(observation, deterministic, action_masks)[0]

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for an observation, of one row or of many.

        :param observation: ``input_ids`` and ``attention_mask``, ``(L,)`` or ``(B, L)`` each
        :param state: returned as it is; the tokens are all the state there is
        :param episode_start: unused
        :param deterministic: whether to take the most likely token
        :param action_masks: ``(V,)`` or ``(B, V)`` bool, the tokens that may be chosen
        :return: actions, ``()`` or ``(B,)`` int64, and ``state``
        """
        check_keys(observation, self._reads)
        single = np.ndim(observation["input_ids"]) == 1
        if single:
            observation = {name: np.asarray(value)[None] for name, value in observation.items()}
            action_masks = None if action_masks is None else np.asarray(action_masks)[None]
        actions = self._predict(observation, deterministic, action_masks).cpu().numpy()
        return (actions.squeeze(axis=0) if single else actions), state

    @torch.no_grad()
    def predict_values(self, obs: Observation, rows: np.ndarray | None = None) -> Tensor:
        """Values ``(B, 1)`` of observations, from cached states and without gradients.

        :param obs: observations of B rows
        :param rows: ``(B,)`` cache slots the rows live in; default 0 to B-1
        """
        return self._values(self._cached_hidden(obs, rows))

    @torch.no_grad()
    def forced_values(self, obs: Observation) -> Tensor:
        """Values ``(B, 1)`` from a forward over the whole rows with the trained weights, without gradients."""
        return self._values(self._forced_hidden(obs))

    @torch.no_grad()
    def next_token_log_probs(
        self,
        language_model: LanguageModel,
        obs: Observation,
        action_masks: np.ndarray | Tensor | None = None,
        rows: np.ndarray | None = None,
    ) -> Tensor:
        """``(B, V)`` log-probs of the next token, in nats, under a model that reads what the policy does; cached.

        :param language_model: with the policy's tokens, such as the reference model; its logits are divided by the
            policy's temperature
        :param obs: observations of B rows
        :param action_masks: ``(B, V)`` bool
        :param rows: ``(B,)`` slots of that model's cache; default 0 to B-1
        """
        ids, lengths, prompt_lengths = self._tokens(obs)
        hidden = language_model.cached(self.context).last_hidden(ids, lengths, rows, prompt_lengths)
        return self._log_distribution(language_model, hidden, action_masks).to(self.device)

    def get_distribution(
        self, obs: Observation, action_masks: np.ndarray | Tensor | None = None
    ) -> CategoricalDistribution:
        """The distribution over the next token; differentiable where gradients are enabled.

        :param obs: observations of B rows
        :param action_masks: ``(B, V)`` bool
        """
        distribution = CategoricalDistribution(int(self.action_space.n))
        if torch.is_grad_enabled():
            with self._autocast():
                log_probs = self._log_distribution(self.language_model, self._forced_hidden(obs), action_masks)
        else:
            log_probs = self._log_distribution(self.acting_model, self._cached_hidden(obs), action_masks)
        return distribution.proba_distribution(log_probs)

    # Learning

    def evaluate_actions(
        self, obs: Observation, actions: Tensor, action_masks: np.ndarray | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate single transitions, each with a forward over its whole prefix, as stock SB3 algorithms do.

        :param obs: observations of B transitions
        :param actions: ``(B,)`` tokens
        :param action_masks: ``(B, V)`` bool
        :return: values ``(B, 1)``, log-probs ``(B,)`` and entropies ``(B,)``
        """
        hidden = self._forced_hidden(obs)
        tokens = torch.as_tensor(actions, device=self.device).long().flatten()
        values, log_prob, entropy = self.evaluate_hidden(
            hidden, tokens, as_mask(action_masks, len(hidden), self.language_model)
        )
        return values, log_prob, entropy

    def evaluate_segments(
        self, segments: SegmentSamples, entropy_gradient: bool = True, value_gradient: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate the M transitions of a minibatch of segments in one teacher-forced forward.

        :param segments: from :meth:`EpisodeBuffer.get`
        :param entropy_gradient: whether gradients are to flow through the entropies; without, they cost less
        :param value_gradient: what the gradient of the values is multiplied with on its way from the value head into
            the transformer, whose weights serve the log-probs, too
        :return: values ``(M, 1)``, log-probs ``(M,)`` and entropies ``(M,)``
        """
        hidden = self.hidden_of(segments)
        return self.evaluate_hidden(hidden, segments.actions, segments.action_masks, entropy_gradient, value_gradient)

    def passes(self, segments: Sequence[Segment], most_tokens: int) -> Iterator[np.ndarray]:
        """Indices of segments, in groups for an :meth:`evaluate_segments` each: what is cheap to read together is.

        :param most_tokens: of a pass
        """
        return self._stepper.passes([segment.ids[: segment.length] for segment in segments], most_tokens)

    def hidden_of(self, segments: SegmentSamples) -> Tensor:
        """``(M, H)`` the hidden states that the actions of a minibatch are predicted from."""
        with self._autocast(), self._checkpointed():
            return self._stepper.hidden_at(
                segments.input_ids, segments.lengths, segments.rows, segments.positions, segments.prompt_lengths
            )

    def evaluate_hidden(
        self,
        hidden: Tensor,
        actions: Tensor,
        masks: Tensor | None,
        entropy_gradient: bool = True,
        value_gradient: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`evaluate_segments` from hidden states ``(M, H)``."""
        with self._autocast():
            log_prob, entropy = self.language_model.token_log_probs(
                hidden, actions, self.temperature, masks, entropy_gradient=entropy_gradient
            )
        assert entropy is not None
        fixed = hidden.detach()
        return self._values(fixed + value_gradient * (hidden - fixed)), log_prob, entropy

    def _autocast(self) -> AbstractContextManager[Any]:
        """Where learning computes in a smaller type."""
        # Checkpoints would compute again without the plain attention, which holds (B, heads, L, L) scores.
        plain = self.context <= PLAIN_ATTENTION and not self.gradient_checkpointing
        return contextlib.nullcontext() if self.autocast is None else autocast(self.autocast, self.device, plain)

    def _checkpointed(self) -> AbstractContextManager[Any]:
        """Where learning keeps as little as it can."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpointed(self.transformer)
        return contextlib.nullcontext()

    def _values(self, hidden: Tensor) -> Tensor:
        """:param hidden: ``(B, H)``; the value head is fp32 whatever the transformer is."""
        return self.value_net((hidden.detach() if self.value_trunk == "detached" else hidden).float())

    def _log_distribution(self, lm: LanguageModel, hidden: Tensor, action_masks: np.ndarray | Tensor | None) -> Tensor:
        masks = as_mask(action_masks, len(hidden), self.language_model)
        return log_distribution(lm.head(hidden), self.temperature, masks)

    @property
    def _stepper(self) -> CachedModel:
        """Of the trained weights."""
        return self.language_model.cached(self.context)

    @property
    def acting_model(self) -> LanguageModel:
        """What tokens are drawn from: the language model itself, or its copy in ``rollout_dtype``."""
        if self.rollout_dtype is None:
            return self.language_model
        if self._acting_copy is None:
            self._acting_copy = ActingCopy(self.language_model, resolve_dtype(self.rollout_dtype))
            self._acting_copy.current().compile(decoding=self.compile_model)
        return self._acting_copy.current()

    def forget_cached(self) -> None:
        """Drop what acting has cached."""
        self.acting_model.cached(self.context).forget()

    def _cached_hidden(self, obs: Observation, rows: np.ndarray | None = None) -> Tensor:
        """``(B, H)`` from the cache."""
        ids, lengths, prompt_lengths = self._tokens(obs)
        return self.acting_model.cached(self.context).last_hidden(ids, lengths, rows, prompt_lengths)

    def _forced_hidden(self, obs: Observation) -> Tensor:
        """``(B, H)`` from a forward over the whole rows, with gradients where enabled."""
        ids, lengths, prompt_lengths = self._tokens(obs)
        with self._autocast(), self._checkpointed():
            return self._stepper.hidden_at(ids, lengths, np.arange(len(ids)), lengths - 1, prompt_lengths)

    def _tokens(self, obs: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Checked token ids ``(B, L)``, lengths ``(B,)`` and, where they matter, prompt lengths ``(B,)``."""
        return read_tokens(obs, self._reads, self.context, self.language_model.vocab_size)

    @property
    def _reads(self) -> tuple[str, ...]:
        """What of an observation the policy looks at."""
        encoder = is_encoder_decoder(self.transformer.config)
        return ("input_ids", "attention_mask", "prompt_length") if encoder else ("input_ids", "attention_mask")

    # Copying and saving

    def blueprint(self) -> LanguageModelBlueprint:
        """The language model's architecture and tokenizer, without weights."""
        return LanguageModelBlueprint.of(self.language_model)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "language_model": self.blueprint(),
            "temperature": self.temperature,
            "sampling": self.sampling.as_dict(),
            "value_head": self.value_head,
            "value_trunk": self.value_trunk,
            "lora": self.lora,
            "autocast": self.autocast,
            "gradient_checkpointing": self.gradient_checkpointing,
            "rollout_dtype": self.rollout_dtype,
            "compile": self.compile_model,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModelPolicy:
        # A LanguageModel is shared when copied; a copy of the policy needs weights and a cache of its own.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo.update(self.language_model.shared_in_copies())
        for name, value in self.__dict__.items():
            twin.__dict__[name] = None if name == "_acting_copy" else copy.deepcopy(value, memo)
        twin.language_model = self.language_model.with_model(twin.transformer)
        return twin

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. The policy's base weights become its own where they differ from those it shares.

        Without an adapter nothing is shared, and it is torch's method.
        """
        if self.lora is not None and not assign:
            # Written in place, they would change the reference model, too.
            for name, parameter in self.named_parameters():
                new = state_dict.get(name)
                if not parameter.requires_grad and new is not None and new.shape == parameter.shape:
                    new = new.to(parameter.device, parameter.dtype)
                    if not torch.equal(new, parameter):
                        parameter.data = new.clone()
        return super().load_state_dict(state_dict, strict, assign)

"""What agents ask a text environment about, whether it has one row or many."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from textgym.envs.decision_process import DecisionProcess
from textgym.envs.options import TextGenOptions
from textgym.envs.sharing import share
from textgym.language_model import LanguageModel
from textgym.prompts.rows import PromptSource
from textgym.replies import Reply
from textgym.rewards import Reward
from textgym.sampling import SamplingSettings
from textgym.vocabulary import Vocabulary


class AskedByAgents:
    """Settings and models of a text environment: what all forms of it say alike."""

    _process: DecisionProcess
    _spec: Any = None

    @property
    def spec(self) -> Any:
        """The specification that makes this environment again; models in it are shared, not copied."""
        return self._spec

    @spec.setter
    def spec(self, spec: Any) -> None:
        if spec is not None:
            spec.kwargs = {name: share(value) for name, value in spec.kwargs.items()}
        self._spec = spec

    @property
    def options(self) -> TextGenOptions:
        """The options, validated."""
        return self._process.options

    @property
    def vocabulary(self) -> Vocabulary:
        """The language model's tokens."""
        return self._process.vocabulary

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer."""
        return self.vocabulary.tokenizer

    @property
    def sampling(self) -> SamplingSettings:
        """How an agent samples here: what else samples from its policy does so, too."""
        return self._process.sampling

    @property
    def temperature(self) -> float:
        """Divides the logits of reference and policy alike."""
        return self.sampling.temperature

    @property
    def max_new_tokens(self) -> int:
        """Budget of a turn, in tokens."""
        return self.sampling.max_new_tokens

    @property
    def max_actions(self) -> int:
        """Most tokens that a policy writes in an episode."""
        return self._process.rules.max_actions

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of a prompt; longer ones are cut."""
        limit = self.sampling.max_prompt_tokens
        assert limit is not None
        return limit

    @property
    def prompts(self) -> PromptSource:
        """What prompts are drawn from."""
        return self._process.stream.source

    @property
    def reward(self) -> Reward:
        """Φ, what texts are scored with."""
        return self._process.reward

    @property
    def reply(self) -> Reply | None:
        """Who speaks after each turn; None where an episode is one turn."""
        return self._process.episodes.texts.reply

    @property
    def masking(self) -> bool:
        """Whether ``action_masks()`` restricts the actions."""
        return self.options.action_masking

    @property
    def kl_coef(self) -> float:
        """β, the weight of the KL penalty; may be changed at any time."""
        return self._process.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        self._process.kl_coef = value

    @property
    def has_reference(self) -> bool:
        """Whether a reference model is loaded, so that infos have ``kl`` and ``ref_log_prob``."""
        return self._process.episodes.scorer.reference is not None

    def reference_language_model(self) -> LanguageModel:
        """The frozen model that the KL is measured against; opened now if nothing has needed it yet."""
        return self._process.language_model.hold()

    def policy_language_model(self, device: Any = None) -> LanguageModel:
        """A trainable copy of the environment's language model: where a policy starts, at KL 0 to the reference."""
        return self._process.language_model.trainable_copy(device)

    def forget_cached(self) -> None:
        """Drop what the models have cached of all rows, so that what comes does not depend, in its last bits, on when.

        An agent does this before each rollout: then a run that is resumed from any rollout's beginning, with nothing
        cached, computes the same as one that was never stopped.
        """
        self._process.episodes.forget_cached()

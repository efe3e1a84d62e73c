"""Rewards: what turns text into numbers.

A reward is any callable with TRL's signature, ``reward(prompts, completions, **columns) -> list[float |
None]``, or a :class:`Reward`, which is such a callable too and composes by arithmetic. The environment passes
whatever it is given through :func:`as_reward`.

Each reward's module is imported when its name is first used, so that a package that only one of them needs may be
missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import FunctionReward
from textgym.rewards.prefixes import PrefixBatch

if TYPE_CHECKING:
    from textgym.json_server import RequestLimits
    from textgym.rewards.combining.constraint import Constraint
    from textgym.rewards.combining.discounted import DiscountedPotential
    from textgym.rewards.combining.ensemble import Ensemble
    from textgym.rewards.combining.length_debiased import LengthDebiased
    from textgym.rewards.combining.monte_carlo_dropout import MonteCarloDropout
    from textgym.rewards.combining.router import Router
    from textgym.rewards.combining.running_normalisation import RunningNormalized
    from textgym.rewards.learned.adversarial import AdversarialReward, HashingDiscriminator
    from textgym.rewards.learned.causal_discriminator import CausalDiscriminator
    from textgym.rewards.learned.novelty import NoveltyReward
    from textgym.rewards.learning import LearningReward, learn_from
    from textgym.rewards.models.causal import CausalRewardModel
    from textgym.rewards.models.classifier import ClassifierReward
    from textgym.rewards.models.coherence import EmbeddingCoherence, LikelihoodCoherence
    from textgym.rewards.models.embedding import EmbeddingSimilarity, SentenceEncoder
    from textgym.rewards.models.language_model import (
        Fluency,
        LogProbReward,
        SentenceFluency,
        TargetLikelihood,
        TokenMatch,
    )
    from textgym.rewards.models.process import ProcessReward
    from textgym.rewards.opening import as_reward
    from textgym.rewards.outside.answer_store import AnswerStore, AnswerStoreError
    from textgym.rewards.outside.human import HumanReward, TerminalAsker
    from textgym.rewards.outside.remote import RemoteReward
    from textgym.rewards.outside.serving import RewardServer, reward_app, serve_reward
    from textgym.rewards.reward_directory import open_reward
    from textgym.rewards.text.diversity import EmbeddingDiversity, SelfBLEU
    from textgym.rewards.text.formats import JsonFormat, RegexMatch, XmlTags
    from textgym.rewards.text.lexicons import LanguageIdentity, Profanity, SentimentLexicon
    from textgym.rewards.text.predicted_difference import PredictedDifference, difference_rows
    from textgym.rewards.text.reference_metrics import Bleu, ChrF, ExactMatch, Meteor, Rouge, Ter, TokenF1
    from textgym.rewards.text.text_rules import (
        DistinctN,
        Grammar,
        KeywordAbsence,
        KeywordPresence,
        LengthTarget,
        Readability,
        Repetition,
    )

__all__ = [
    "AdversarialReward",
    "AnswerStore",
    "AnswerStoreError",
    "Bleu",
    "CausalDiscriminator",
    "CausalRewardModel",
    "ChrF",
    "ClassifierReward",
    "Constraint",
    "DiscountedPotential",
    "DistinctN",
    "EmbeddingCoherence",
    "EmbeddingDiversity",
    "EmbeddingSimilarity",
    "Ensemble",
    "ExactMatch",
    "Fluency",
    "FunctionReward",
    "Grammar",
    "HashingDiscriminator",
    "HumanReward",
    "JsonFormat",
    "KeywordAbsence",
    "KeywordPresence",
    "LanguageIdentity",
    "LearningReward",
    "LengthDebiased",
    "LengthTarget",
    "LikelihoodCoherence",
    "LogProbReward",
    "Meteor",
    "MonteCarloDropout",
    "NoveltyReward",
    "PredictedDifference",
    "PrefixBatch",
    "ProcessReward",
    "Profanity",
    "Readability",
    "RegexMatch",
    "RemoteReward",
    "Repetition",
    "RequestLimits",
    "Reward",
    "RewardError",
    "RewardServer",
    "Rouge",
    "Router",
    "RunningNormalized",
    "SelfBLEU",
    "SentenceEncoder",
    "SentenceFluency",
    "SentimentLexicon",
    "TargetLikelihood",
    "Ter",
    "TerminalAsker",
    "TokenF1",
    "TokenMatch",
    "XmlTags",
    "as_reward",
    "difference_rows",
    "learn_from",
    "open_reward",
    "reward_app",
    "serve_reward",
]

_MODULES = {
    "AdversarialReward": "learned.adversarial",
    "AnswerStore": "outside.answer_store",
    "AnswerStoreError": "outside.answer_store",
    "Bleu": "text.reference_metrics",
    "CausalDiscriminator": "learned.causal_discriminator",
    "CausalRewardModel": "models.causal",
    "ChrF": "text.reference_metrics",
    "ClassifierReward": "models.classifier",
    "Constraint": "combining.constraint",
    "DiscountedPotential": "combining.discounted",
    "DistinctN": "text.text_rules",
    "EmbeddingCoherence": "models.coherence",
    "EmbeddingDiversity": "text.diversity",
    "EmbeddingSimilarity": "models.embedding",
    "Ensemble": "combining.ensemble",
    "ExactMatch": "text.reference_metrics",
    "Fluency": "models.language_model",
    "Grammar": "text.text_rules",
    "HashingDiscriminator": "learned.adversarial",
    "HumanReward": "outside.human",
    "JsonFormat": "text.formats",
    "KeywordAbsence": "text.text_rules",
    "KeywordPresence": "text.text_rules",
    "LanguageIdentity": "text.lexicons",
    "LearningReward": "learning",
    "LengthDebiased": "combining.length_debiased",
    "LengthTarget": "text.text_rules",
    "LikelihoodCoherence": "models.coherence",
    "LogProbReward": "models.language_model",
    "Meteor": "text.reference_metrics",
    "MonteCarloDropout": "combining.monte_carlo_dropout",
    "NoveltyReward": "learned.novelty",
    "PredictedDifference": "text.predicted_difference",
    "ProcessReward": "models.process",
    "Profanity": "text.lexicons",
    "Readability": "text.text_rules",
    "RegexMatch": "text.formats",
    "RemoteReward": "outside.remote",
    "Repetition": "text.text_rules",
    "RequestLimits": "outside.serving",
    "RewardServer": "outside.serving",
    "Rouge": "text.reference_metrics",
    "Router": "combining.router",
    "RunningNormalized": "combining.running_normalisation",
    "SelfBLEU": "text.diversity",
    "SentenceEncoder": "models.embedding",
    "SentenceFluency": "models.language_model",
    "SentimentLexicon": "text.lexicons",
    "TargetLikelihood": "models.language_model",
    "Ter": "text.reference_metrics",
    "TerminalAsker": "outside.human",
    "TokenF1": "text.reference_metrics",
    "TokenMatch": "models.language_model",
    "XmlTags": "text.formats",
    "as_reward": "opening",
    "difference_rows": "text.predicted_difference",
    "learn_from": "learning",
    "open_reward": "reward_directory",
    "reward_app": "outside.serving",
    "serve_reward": "outside.serving",
}


def __getattr__(name: str) -> Any:
    # Who rewards text with a Python function need not wait for transformers to load.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"textgym.rewards.{_MODULES[name]}"), name)

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

from textgym.rewards.base import FunctionReward, PrefixBatch, Reward, RewardError, as_reward

if TYPE_CHECKING:
    from textgym.rewards.adversarial import AdversarialReward, HashingDiscriminator
    from textgym.rewards.answer_store import AnswerStore, AnswerStoreError
    from textgym.rewards.causal import CausalRewardModel
    from textgym.rewards.causal_discriminator import CausalDiscriminator
    from textgym.rewards.classifier import ClassifierReward, ProcessReward
    from textgym.rewards.coherence import EmbeddingCoherence, LikelihoodCoherence
    from textgym.rewards.constraint import Constraint
    from textgym.rewards.discounted import DiscountedPotential
    from textgym.rewards.diversity import EmbeddingDiversity, SelfBLEU
    from textgym.rewards.embedding import EmbeddingSimilarity, SentenceEncoder
    from textgym.rewards.ensemble import Ensemble
    from textgym.rewards.formats import JsonFormat, RegexMatch, XmlTags
    from textgym.rewards.human import HumanReward, TerminalAsker
    from textgym.rewards.language_model import Fluency, LogProbReward, SentenceFluency, TargetLikelihood, TokenMatch
    from textgym.rewards.learning import LearningReward, learn_from
    from textgym.rewards.length_debiased import LengthDebiased
    from textgym.rewards.lexicons import LanguageIdentity, Profanity, SentimentLexicon
    from textgym.rewards.monte_carlo_dropout import MonteCarloDropout
    from textgym.rewards.novelty import NoveltyReward
    from textgym.rewards.predicted_difference import PredictedDifference, difference_rows
    from textgym.rewards.reference_metrics import Bleu, ChrF, ExactMatch, Meteor, Rouge, Ter, TokenF1
    from textgym.rewards.remote import RemoteReward
    from textgym.rewards.reward_directory import open_reward
    from textgym.rewards.router import Router
    from textgym.rewards.running_normalisation import RunningNormalized
    from textgym.rewards.serving import RequestLimits, RewardServer, reward_app, serve_reward
    from textgym.rewards.text_rules import (
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
    "AdversarialReward": "adversarial",
    "AnswerStore": "answer_store",
    "AnswerStoreError": "answer_store",
    "Bleu": "reference_metrics",
    "CausalDiscriminator": "causal_discriminator",
    "CausalRewardModel": "causal",
    "ChrF": "reference_metrics",
    "ClassifierReward": "classifier",
    "Constraint": "constraint",
    "DiscountedPotential": "discounted",
    "DistinctN": "text_rules",
    "EmbeddingCoherence": "coherence",
    "EmbeddingDiversity": "diversity",
    "EmbeddingSimilarity": "embedding",
    "Ensemble": "ensemble",
    "ExactMatch": "reference_metrics",
    "Fluency": "language_model",
    "Grammar": "text_rules",
    "HashingDiscriminator": "adversarial",
    "HumanReward": "human",
    "JsonFormat": "formats",
    "KeywordAbsence": "text_rules",
    "KeywordPresence": "text_rules",
    "LanguageIdentity": "lexicons",
    "LearningReward": "learning",
    "LengthDebiased": "length_debiased",
    "LengthTarget": "text_rules",
    "LikelihoodCoherence": "coherence",
    "LogProbReward": "language_model",
    "Meteor": "reference_metrics",
    "MonteCarloDropout": "monte_carlo_dropout",
    "NoveltyReward": "novelty",
    "PredictedDifference": "predicted_difference",
    "ProcessReward": "classifier",
    "Profanity": "lexicons",
    "Readability": "text_rules",
    "RegexMatch": "formats",
    "RemoteReward": "remote",
    "Repetition": "text_rules",
    "RequestLimits": "serving",
    "RewardServer": "serving",
    "Rouge": "reference_metrics",
    "Router": "router",
    "RunningNormalized": "running_normalisation",
    "SelfBLEU": "diversity",
    "SentenceEncoder": "embedding",
    "SentenceFluency": "language_model",
    "SentimentLexicon": "lexicons",
    "TargetLikelihood": "language_model",
    "Ter": "reference_metrics",
    "TerminalAsker": "human",
    "TokenF1": "reference_metrics",
    "TokenMatch": "language_model",
    "XmlTags": "formats",
    "difference_rows": "predicted_difference",
    "learn_from": "learning",
    "open_reward": "reward_directory",
    "reward_app": "serving",
    "serve_reward": "serving",
}


def __getattr__(name: str) -> Any:
    # Who rewards text with a Python function need not wait for transformers to load.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"textgym.rewards.{_MODULES[name]}"), name)

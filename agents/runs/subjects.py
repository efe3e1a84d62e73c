"""Models to sample from, each with what its run says about how: what ``generate`` and ``evaluate`` work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgym.agents.common.pretrained import AGENT, read_sampling
from textgym.agents.runs.config import RunConfig
from textgym.agents.runs.folder import RunFolder
from textgym.agents.runs.prompt_record import prompt_hash, trained_on
from textgym.agents.runs.training import policy_of, reply_of, run_config
from textgym.agents.runs.trust import check_code, check_model_code, code_in_reply, code_of
from textgym.envs.options import TextGenOptions
from textgym.episode_rules import DEFAULT_MAX_PROMPT_TOKENS, prompt_room
from textgym.language_model import LanguageModel, load_language_model
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply
from textgym.sampling import SamplingSettings


@dataclass
class Subject:
    """A model to sample from.

    :param name: what the user calls it
    :param model: the model
    :param config: options of the run that it is of, else the defaults
    :param run: the folder of that run, if it is of one
    :param sampling: how it was trained to be sampled from: its run's settings, its agent's, else the defaults
    """

    name: str
    model: LanguageModel
    config: RunConfig
    run: Path | None
    sampling: SamplingSettings

    def learned_from(self, rows: list[PromptRow]) -> list[bool]:
        """Which of some prompts its run trains on; none where that isn't known."""
        known = None if self.run is None else trained_on(RunFolder(self.run).held_out)
        return [known is not None and prompt_hash(row.prompt) in known for row in rows]

    def reference(self, given: str | None = None) -> LanguageModel:
        """What its KL is measured against: what is given, the model its run started from, or the model itself."""
        if given is None and self.run is None:
            return self.model
        if given is None:
            return load(self.config.model, self.config, self.config.tokenizer)
        return load(given, self.config)

    def sampling_with(self, settings: dict[str, Any], replies: bool = False) -> SamplingSettings:
        """Its settings, but for those that are given.

        :param replies: whether somebody replies
        :raises ValueError: if they are impossible together, or too long for the model
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("action_masking") is False:
            given = {"top_k": 0, "top_p": 1.0, **given}
        sampling = (self.sampling if replies else self.sampling.one_turn()).changed(**given)
        if given.get("max_prompt_tokens") is None and given.keys() & _BUDGETS:
            limit, most = self.model.vocabulary.context_limit, self.config.max_prompt_tokens
            budget, name = sampling.max_new_tokens, "max_new_tokens"
            if replies:
                limits = sampling.turn_limits(limit, most or DEFAULT_MAX_PROMPT_TOKENS)
                sampling, budget, name = sampling.with_turns(limits), limits.max_total_tokens, "max_total_tokens"
            sampling = dataclasses.replace(sampling, max_prompt_tokens=prompt_room(most, budget, limit, name))
        return sampling

    def reply(self, given: str | None, max_reply_tokens: int | None, trusted: bool) -> Reply | None:
        """Who speaks after its turns: who is given, or who does so in its run; None for nobody, or ``"none"``.

        :param max_reply_tokens: most that a language model says; default the run's
        :param trusted: whether the user has said that code of the run may run
        :raises UntrustedCodeError: if the run's is code, and they haven't
        """
        name = self.config.reply if given is None else given
        if name is None or name == "none":
            return None
        if given is None:
            check_code(code_in_reply(name), self.run or self.name, trusted)
        return reply_of(name, self.config, max_reply_tokens or self.config.max_reply_tokens)


_BUDGETS = {"max_new_tokens", "max_turns", "max_reply_tokens", "max_total_tokens"}


def open_subject(path: str, trusted: bool, template: Mapping[str, Any] | None = None) -> Subject:
    """A run's folder, an agent's or a model's directory, or a name that ``language_model=`` takes.

    :param trusted: whether the user has said that code which somebody else's run or model names may run
    :param template: variables of the chat template, instead of those of the run
    :raises UntrustedCodeError: if there is such code and they haven't
    """
    folder = RunFolder(path)
    if folder.config.is_file():
        algorithm, begun = run_config(path)
        config = _with_template(begun, template)
        check_model_code(config, path, trusted)
        for part in (folder.model, folder.best):
            if part.is_dir():
                return _subject(path, load(str(part), config), config, folder.path, part)
        check_code(code_of(config, algorithm), path, trusted)
        policy = policy_of(path)  # no agent was written yet, but a checkpoint
        model = load_language_model(policy.language_model, chat_template_kwargs=config.template_arguments())
        subject = _subject(path, model, config, folder.path, None)
        subject.sampling = dataclasses.replace(subject.sampling, chat=policy.sampling.chat)
        return subject
    parent = RunFolder(Path(path).parent)
    if parent.config.is_file():
        config = _with_template(run_config(parent.path)[1], template)
        check_model_code(config, path, trusted)
        return _subject(path, load(path, config), config, parent.path, Path(path))
    config = _with_template(RunConfig(trust_remote_code=trusted), template)
    return _subject(path, load(path, config), config, None, Path(path))


def _with_template(config: RunConfig, given: Mapping[str, Any] | None) -> RunConfig:
    """A run's options with some variables of the chat template instead of its own."""
    merged: Any = {**config.template_arguments(), **(given or {})}
    return dataclasses.replace(config, chat_template_kwargs=merged) if given else config


def load(model: str, config: RunConfig, tokenizer: str | None = None) -> LanguageModel:
    """A language model on the run's device and in its type."""
    return load_language_model(
        model,
        tokenizer=tokenizer,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        chat_template_kwargs=config.template_arguments(),
    )


def _subject(path: str, model: LanguageModel, config: RunConfig, run: Path | None, agent: Path | None) -> Subject:
    """:param agent: where the model is, perhaps with the agent that was saved with it"""
    saved = read_sampling(agent) if agent is not None and (agent / AGENT).is_file() else SamplingSettings()
    if run is None:
        return Subject(path, model, config, run, saved)
    # Only the agent knows whether the run's prompts were conversations.
    return Subject(path, model, config, run, dataclasses.replace(sampling_of_run(config, model), chat=saved.chat))


def sampling_of_run(config: RunConfig, model: LanguageModel) -> SamplingSettings:
    """How texts are sampled in a run's environment."""
    options = TextGenOptions(**{name: getattr(config, name) for name in _SAMPLING}, reply=config.reply)
    return options.episode_rules(model.vocabulary, None).sampling


_SAMPLING = (
    "max_new_tokens min_new_tokens max_prompt_tokens temperature stop action_masking top_k top_p max_turns "
    "max_reply_tokens max_total_tokens reply_overflow"
).split()

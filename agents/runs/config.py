# ruff: noqa: RUF009  a field's default is made by _option, which adds its help
"""The configuration of a training run: one flat table of options, from flags and from a YAML or JSON file.

:class:`RunConfig` is the table. The command line, the configuration file and
``config.yaml`` in the run's folder all come from it, so an option exists once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from textgym.checks import check_choice, check_int, check_number, check_seed, shown
from textgym.sampling import DEFAULT_MAX_TURNS, check_turn_limits


def _option(default: Any, section: str, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"section": section, "help": text})


MODEL, DATA, REWARD, EPISODE, ALGORITHM, RUN = "Model", "Prompts", "Reward and KL", "Episodes", "Agent", "Run"
TURNS = "Turns"
FURTHER = "Further arguments of the agent"


@dataclass
class RunConfig:
    """Options of a training run; ``metadata`` of each field has its section and its help.

    Those of the environment and of the agents have the names and the meaning that they have there, except ``model``
    (``language_model``), ``rows`` (``num_envs``) and ``normalize_advantage`` (``minibatch``, ``rollout`` or ``none``).
    Those of the agents are None where the agent's own default holds; each agent has some of them, and giving it another
    one is an error (:mod:`textgym.agents.runs.agents`).
    """

    model: str = _option("embedded", MODEL, "embedded, smollm2, a directory or a hub id")
    tokenizer: str | None = _option(None, MODEL, "directory or hub id of another tokenizer than the model's own")
    trust_remote_code: bool = _option(False, MODEL, "run Python code that comes with the model, where it has some")
    chat_template_kwargs: list[str] | None = _option(
        None, MODEL, "name=value, for variables of the chat template, such as enable_thinking=false; several times"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", MODEL, "type of the weights")
    device: str = _option("auto", MODEL, "auto, cpu, cuda, cuda:1, mps")
    autocast: Literal["bfloat16", "float16"] | None = _option(
        None, MODEL, "learn with matrix products in this type; the trained weights are then float32, whatever dtype is"
    )
    gradient_checkpointing: bool = _option(
        False, MODEL, "learn without keeping activations, which are computed again: less memory, more time"
    )
    rollout_dtype: Literal["bfloat16", "float16", "float32"] | None = _option(
        None, MODEL, "act with a copy of the weights in this type"
    )
    compile: bool = _option(False, MODEL, "act and learn through torch.compile: some minutes of patience, then faster")
    lora_rank: int | None = _option(None, MODEL, "train LoRA matrices of this rank instead of all weights")
    lora_alpha: float | None = _option(None, MODEL, "scale of LoRA, divided by the rank; default twice the rank")
    lora_target_modules: list[str] | None = _option(None, MODEL, "layers that get LoRA; default by architecture")
    value_head: Literal["linear", "mlp"] = _option("linear", MODEL, "value head on the last hidden states")
    value_trunk: Literal["shared", "detached"] = _option(
        "shared", MODEL, "whether the value loss trains the transformer, too"
    )

    prompts: str = _option(
        "train",
        DATA,
        "train (embedded), a file (.jsonl, .json, .csv, .tsv, .txt, .parquet, also .gz), a folder of them, a hub id",
    )
    prompt_column: str = _option("prompt", DATA, "column with the prompts")
    split: str | None = _option(None, DATA, "which part of prompts that have several, such as train")
    drop_column: list[str] | None = _option(None, DATA, "column to leave out; may be given several times")
    rename_column: list[str] | None = _option(None, DATA, "OLD=NEW, a new name of a column; may be given several times")
    held_out: str = _option(
        "auto",
        DATA,
        "held-out prompts: a share (0.1) or number (200) taken out of the prompts, another file, or none, to evaluate "
        "on the training prompts; auto: the embedded test prompts beside the embedded train prompts, else 0.1",
    )
    split_seed: int = _option(0, DATA, "another one holds out other prompts; runs with one seed hold out the same")

    reward: str = _option(
        "embedded",
        REWARD,
        "embedded, a formula of rewards such as '0.5*coherence + 0.5*grammar' (textgym rewards lists them), "
        "file.py:function, module:object, or a directory or hub id of a reward model",
    )
    reward_every: str = _option(
        "1", REWARD, "score every so many tokens and at the end; turn: at each turn's end; end: only the finished text"
    )
    kl_coef: float = _option(0.05, REWARD, "weight of the KL penalty; 0 for none")
    kl_estimator: Literal["k1", "k2", "k3"] = _option("k1", REWARD, "estimator of the KL per token")
    kl_target: float | None = _option(
        None,
        REWARD,
        "adapt kl_coef so that the KL per completion approaches this, nats; 0: kl_coef stays. Default 0 for the "
        "embedded model, for others 0.2 times the tokens of the longest episode, with kl_coef as kl_coef_min",
    )
    kl_coef_min: float | None = _option(None, REWARD, "adapting makes kl_coef no less than this; default 0")
    kl_horizon: float | None = _option(
        None,
        REWARD,
        "completions over which kl_coef may change by a factor of about 1.2; default 10000, and less where kl_target "
        "is a default",
    )
    max_kl: float | None = _option(None, REWARD, "end training when a rollout's KL per completion exceeds this, nats")
    missing_eos_penalty: float = _option(0.0, REWARD, "subtracted where the token budget ran out")

    rows: int = _option(64, EPISODE, "texts written side by side, by each process")
    max_new_tokens: int = _option(32, EPISODE, "budget of a completion, tokens; with a reply, of a turn")
    min_new_tokens: int = _option(0, EPISODE, "an end before that many tokens ends nothing")
    max_prompt_tokens: int | None = _option(
        None, EPISODE, "longer texts are cut on the left, conversations in their oldest turns; default 64 or what fits"
    )
    prompt_overflow: Literal["truncate", "error"] = _option("truncate", EPISODE, "what to do with longer prompts")
    stop: list[str] | None = _option(
        None,
        EPISODE,
        r"strings that end the text; may be given several times; as a flag, \n is a newline and \t a tab",
    )
    temperature: float = _option(1.0, EPISODE, "divides the logits of policy and reference")
    action_masking: bool = _option(False, EPISODE, "mask special tokens, and the end before min_new_tokens")
    top_k: int = _option(0, EPISODE, "with masking: only the reference's k most likely tokens; 0 for all")
    top_p: float = _option(1.0, EPISODE, "with masking: only the reference's likeliest tokens up to this probability")

    reply: str | None = _option(
        None,
        TURNS,
        "who speaks after each turn: file.py:function or module:object, model:NAME (a language model), tool:calculate, "
        "tool:file.py:function (several with commas), script:FILE (a line after another), http://... (a server); "
        "default nobody, and a text is one turn",
    )
    max_turns: int | None = _option(None, TURNS, "turns of an episode; default 4")
    max_reply_tokens: int | None = _option(None, TURNS, "of what a reply says; longer ones are cut; default 32")
    max_total_tokens: int | None = _option(
        None, TURNS, "budget of an episode; default max_turns times max_new_tokens and max_reply_tokens, or what fits"
    )
    reply_overflow: Literal["truncate", "error"] = _option("truncate", TURNS, "what to do with longer replies")

    learning_rate: float | None = _option(None, ALGORITHM, "of Adam; default 1e-4, and 1e-3 of TRPO's value head")
    lr_schedule: Literal["constant", "linear"] = _option("constant", ALGORITHM, "linear: falls to 0 at the end")
    n_steps: int | None = _option(None, ALGORITHM, "tokens per row and rollout; default those of the longest episode")
    episodes: int | None = _option(None, ALGORITHM, "whole episodes in a rollout; default one for each row")
    group_size: int | None = _option(
        None, ALGORITHM, "completions of each prompt, which are compared; default 4, with DPO 2"
    )
    credit: Literal["completion", "turn", "token"] | None = _option(
        None,
        ALGORITHM,
        "what is compared: completions, or the rewards from each turn or each token on; default completion",
    )
    baseline: Literal["value", "mean", "none"] | None = _option(
        None, ALGORITHM, "of REINFORCE: the value head, the mean of the other episodes, or none; default value"
    )
    loss_type: Literal["grpo", "dr_grpo", "dapo"] | None = _option(
        None, ALGORITHM, "how GRPO averages over tokens; default grpo"
    )
    scale: Literal["group", "batch", "none"] | None = _option(
        None, ALGORITHM, "whose standard deviation GRPO divides advantages by; default group"
    )
    mask_top_p: float | None = _option(None, ALGORITHM, "of NLPO's mask: the likeliest tokens up to this; default 0.9")
    mask_update_every: int | None = _option(None, ALGORITHM, "rollouts between two copies of NLPO's mask; default 10")
    cg_max_steps: int | None = _option(None, ALGORITHM, "of TRPO's conjugate gradients; default 15")
    cg_damping: float | None = _option(None, ALGORITHM, "of TRPO's Fisher matrix; default 0.1")
    line_search_shrinking_factor: float | None = _option(None, ALGORITHM, "of TRPO's steps; default 0.8")
    line_search_max_iter: int | None = _option(None, ALGORITHM, "steps that TRPO tries; default 10")
    n_critic_updates: int | None = _option(None, ALGORITHM, "passes of TRPO's value head; default 10")
    sub_sampling_factor: int | None = _option(None, ALGORITHM, "of the states that TRPO looks at; default 1, all")
    keep: int | None = _option(None, ALGORITHM, "best of each prompt that expert iteration learns; default 1")
    threshold: float | None = _option(None, ALGORITHM, "least return that expert iteration learns")
    quantile: float | None = _option(None, ALGORITHM, "share of a rollout that is below what expert iteration learns")
    beta: float | None = _option(None, ALGORITHM, "of DPO's loss; default 0.1")
    label_smoothing: float | None = _option(None, ALGORITHM, "probability that DPO's preferences are wrong; default 0")
    offline: bool | None = _option(None, ALGORITHM, "DPO learns from the reference model's texts; default yes")
    min_margin: float | None = _option(None, ALGORITHM, "least difference of a pair of DPO; default 0.0001")
    replay_episodes: int | None = _option(
        None, ALGORITHM, "newest episodes that soft Q and Q learning draw from; default 1000"
    )
    batch_episodes: int | None = _option(
        None, ALGORITHM, "episodes of a minibatch from the replay; default as many as a rollout has"
    )
    gradient_steps: int | None = _option(None, ALGORITHM, "minibatches from the replay after a rollout; default 4")
    td_lambda: float | None = _option(
        None, ALGORITHM, "λ of the targets: 0 one step, 1 the whole rest; default 1 (softq), 0 (q), 0.9 (sarsa)"
    )
    tau: float | None = _option(None, ALGORITHM, "how far the target copy moves at an update of it; default 0.5")
    target_update_interval: int | None = _option(
        None, ALGORITHM, "rollouts between two updates of the target copy; default 1"
    )
    q_temperature: float | None = _option(None, ALGORITHM, "α: Q = V + α log π, for Q-learning and SARSA; default 0.1")
    epsilon: float | None = _option(None, ALGORITHM, "share of explored tokens of Q-learning; default 1")
    explore_with: Literal["policy", "reference", "uniform"] | None = _option(
        None, ALGORITHM, "what Q-learning explores with; default policy"
    )
    double: bool | None = _option(None, ALGORITHM, "double Q-learning; default yes")
    expected: bool | None = _option(None, ALGORITHM, "expected SARSA; default no")
    batch_size: int | None = _option(
        None, ALGORITHM, "tokens per minibatch and process; default 512 with PPO, else the whole rollout"
    )
    n_epochs: int | None = _option(
        None, ALGORITHM, "passes over a rollout; default 4 with PPO, NLPO and expert iteration, else 1"
    )
    gamma: float | None = _option(None, ALGORITHM, "discount per token; default 1")
    gae_lambda: float | None = _option(
        None, ALGORITHM, "of generalised advantage estimation; default 0.95 with PPO, 1 with A2C"
    )
    clip_range: float | None = _option(None, ALGORITHM, "ratios are clipped to 1 ± this; default 0.2")
    clip_range_high: float | None = _option(None, ALGORITHM, "ratios are clipped to 1 + this; default clip_range")
    clip_range_vf: float | None = _option(None, ALGORITHM, "values are clipped to this around the old ones")
    normalize_advantage: Literal["minibatch", "rollout", "none"] | None = _option(
        None, ALGORITHM, "over what advantages are normalised; default minibatch with PPO, NLPO and TRPO, else none"
    )
    kl_loss_coef: float | None = _option(None, ALGORITHM, "weight of the KL to the reference in the loss; default 0")
    ent_coef: float | None = _option(None, ALGORITHM, "weight of the entropy bonus; default 0")
    vf_coef: float | None = _option(None, ALGORITHM, "weight of the value loss; default 0.1")
    max_grad_norm: float | None = _option(None, ALGORITHM, "gradients are scaled down to this norm; default 1")
    target_kl: float | None = _option(
        None, ALGORITHM, "stop an update at 1.5 times this KL to the old policy, per token; TRPO's bound, default 0.01"
    )
    whiten_rewards: bool | None = _option(
        None, ALGORITHM, "divide the rewards of a rollout by their standard deviation; default no"
    )
    bootstrap_truncated: bool | None = _option(
        None, ALGORITHM, "add V of the last state where the token budget ran out; default no"
    )
    whole_episodes: bool | None = _option(
        None, ALGORITHM, "keep episodes that run when a rollout ends for the next, which ends them; default no"
    )
    scoring: Literal["auto", "deferred", "instant"] | None = _option(
        None, ALGORITHM, "when rewards are computed; default auto"
    )
    importance_cap: float | None = _option(
        None,
        ALGORITHM,
        "most that a token drawn with rollout_dtype counts for its probability under the weights; default 2",
    )
    stats_window_size: int | None = _option(
        None, ALGORITHM, "newest episodes that rollout/* are averaged over; default about as many as a rollout has"
    )

    agent_options: list[str] | None = _option(
        None,
        FURTHER,
        "name=value, for what its constructor takes besides these options, such as target_kl=0.02; several times",
    )

    timesteps: int = _option(49_152, RUN, "tokens to train on, of all processes")
    seed: int = _option(0, RUN, "of everything random")
    threads: int | None = _option(None, RUN, "CPU threads; default what torch chooses")
    eval_every: int = _option(8_192, RUN, "tokens between two evaluations on held-out prompts")
    eval_prompts: int = _option(128, RUN, "held-out prompts that are completed in an evaluation")
    patience: int | None = _option(
        None, RUN, "end training after so many evaluations in a row without a better held-out score than the best"
    )
    samples: int = _option(8, RUN, "completions of an evaluation that are kept as a table")
    checkpoint_every: int = _option(8_192, RUN, "tokens between two checkpoints")
    keep_checkpoints: int = _option(2, RUN, "newest checkpoints that stay")
    tensorboard: bool = _option(True, RUN, "write TensorBoard logs")
    process_timeout: float = _option(
        1_800.0, RUN, "with several processes: seconds that they wait for each other, evaluations included"
    )

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name in ("chat_template_kwargs", "agent_options"):
            given = getattr(self, name)  # in a file it may be a mapping; JSON is YAML
            if isinstance(given, Mapping):
                setattr(self, name, [f"{key}={json.dumps(value)}" for key, value in given.items()])
        for field in dataclasses.fields(self):
            setattr(self, field.name, _checked(field.name, getattr(self, field.name), kinds[field.name]))
        for name in ("rows", "timesteps", "eval_every", "eval_prompts", "checkpoint_every", "keep_checkpoints"):
            check_int(name, getattr(self, name), low=1)
        if self.threads is not None:
            check_int("threads", self.threads, low=1)
        check_number("process_timeout", self.process_timeout, low=0.0, open_low=True, unit="seconds")
        check_int("samples", self.samples, low=0)
        if self.patience is not None:
            check_int("patience", self.patience, low=1)
        check_seed("seed", self.seed)
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise ValueError("lora_alpha and lora_target_modules say how LoRA is to be: they need lora_rank")
        for name in ("kl_target", "kl_coef_min", "max_kl"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0)
        if self.kl_horizon is not None:
            check_number("kl_horizon", self.kl_horizon, low=0.0, open_low=True)
        if self.max_kl is not None and self.kl_coef == 0:
            raise ValueError(f"max_kl={self.max_kl} is a limit of the KL, and with kl_coef=0 none is measured")
        if self.kl_target and self.kl_coef <= 0:
            raise ValueError(
                f"kl_target={self.kl_target} adapts kl_coef by factors, but kl_coef={self.kl_coef}: make it positive"
            )
        every = self.reward_every
        if every not in ("turn", "end") and not (every.isdigit() and int(every) >= 1):
            raise ValueError(f"reward_every={every!r} must be a whole number of at least 1, 'turn' or 'end'")
        check_turn_limits(self.reply, self.max_turns, self.max_reply_tokens, self.max_total_tokens)

        self.template_arguments()  # wrong ones are errors now
        self.agent_arguments()

    @property
    def longest_episode(self) -> int:
        """Most tokens that the policy writes in an episode."""
        if self.reply is None:
            return self.max_new_tokens
        turns = DEFAULT_MAX_TURNS if self.max_turns is None else self.max_turns
        return min(turns * self.max_new_tokens, self.max_total_tokens or turns * self.max_new_tokens)

    def template_arguments(self) -> dict[str, Any]:
        """The variables of the chat template that ``chat_template_kwargs`` names, with their values.

        :raises ValueError: if an entry is not ``name=value``, or its value is not YAML
        """
        return template_arguments(self.chat_template_kwargs)

    def agent_arguments(self) -> dict[str, Any]:
        """The arguments of the agent's constructor that ``agent_options`` names, with their values.

        :raises ValueError: if an entry is not ``name=value``, or its value is not YAML
        """
        return _named_values("agent_options", self.agent_options, "temperature=0.5")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str = "the configuration") -> RunConfig:
        """A configuration from a mapping of option names; the rest gets its defaults.

        :param where: what errors call the mapping
        :raises ValueError: naming an unknown option and the closest known ones, or a wrong value
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(str(name), known)
                hint = f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(known)}"
                raise ValueError(f"{where} has the unknown option {name!r}; {hint}")
        return cls(**options)

    def as_dict(self) -> dict[str, Any]:
        """All options with their values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The options as YAML, in sections."""
        lines = []
        for section, fields in sections().items():
            lines.append(f"# {section}")
            values = {field.name: getattr(self, field.name) for field in fields}
            lines.append(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000))
        return "\n".join(lines)


def template_arguments(options: Sequence[str] | None) -> dict[str, Any]:
    """Variables of a chat template from ``name=value`` texts, whose values are YAML.

    >>> template_arguments(["enable_thinking=false", "effort=low"])
    {'enable_thinking': False, 'effort': 'low'}

    :raises ValueError: if an entry is not ``name=value``, its value is not YAML, or a name comes twice
    """
    return _named_values("chat_template_kwargs", options, "enable_thinking=false")


def _named_values(option: str, entries: Sequence[str] | None, example: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entries or []:
        name, equals, text = entry.partition("=")
        if not equals or name in found:
            problem = "names one twice" if equals else f"must be name=value, such as {example}"
            raise ValueError(f"{option}={entry!r} {problem}")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{option}={entry!r}: the value is not YAML: {error}") from error
        if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", text.strip()):  # YAML takes 1e-4 for a text
            found[name] = float(text)
    return found


def sections() -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields of :class:`RunConfig` by section."""
    by_section: dict[str, list[dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(RunConfig):
        by_section.setdefault(field.metadata["section"], []).append(field)
    return by_section


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML or JSON file.

    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is neither, or no mapping of options
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r} is not a file")
    text = path.read_text(encoding="utf-8-sig")
    try:
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read as {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold a mapping of options, such as 'kl_coef: 0.1'; it holds {options!r:.60}")
    return options


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value in the type that the option has.

    :raises ValueError: if it has another one
    """
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return check_choice(name, value, options)
    if type(None) in options:
        if value is None:
            return None
        return _checked(name, value, Union[tuple(o for o in options if o is not type(None))])  # noqa: UP007
    if get_origin(kind) is list:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{name}={value!r} must be a list of texts")
        return list(items)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
        return value
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{name}={value!r} must be a text")
        return str(value)
    try:
        number = float(value) if isinstance(value, str) and kind is float else value  # YAML reads 1e-4 as a text
        number = int(value) if kind is int and _is_whole(value) else number
        return check_int(name, number) if kind is int else check_number(name, number)
    except (TypeError, ValueError) as error:
        wanted = "whole number" if kind is int else "finite number"
        raise ValueError(f"{name}={shown(value)} must be a {wanted}") from error


def _is_whole(value: Any) -> bool:
    """Whether a number or its text is a whole number: YAML and JSON have 8, 8.0 and "8"."""
    if isinstance(value, str):
        return value.strip().lstrip("+-").isdecimal()
    return isinstance(value, float) and value.is_integer()

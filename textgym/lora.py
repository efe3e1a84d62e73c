"""Low-rank adapters on a language model whose own weights stay as they are, through ``peft``.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds B·A to some weight matrices and trains only B and A. B
starts at zero, so the adapted model starts as its base. The base weights are shared, not copied: the reference model of
an environment and the policy that learns in it are the same weights in memory, without and with the adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from textgym.engine.encoder_decoder import model_inputs
from textgym.engine.merging import adapted_weight, merge_layers
from textgym.engine.shared_weights import copy_sharing_weights, sharing_memo
from textgym.language_model import LanguageModel
from textgym.vocabulary import is_encoder_decoder

if TYPE_CHECKING:
    from peft import LoraConfig

Lora: TypeAlias = "bool | Mapping[str, Any] | LoraConfig | None"
DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Everything else that peft offers would train or change the base weights, begin elsewhere than at the base model, or
# need dropout, which never acts here.
OPTIONS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
)
STARTS_AT_BASE = (True, "gaussian", "orthogonal")
TOKENS = 8  # that go through a model to see which layers text reaches
ADAPTER = "default"  # what peft calls the one adapter of a model
FOLDER = "adapter"


class AdaptedLanguageModel(LanguageModel):
    """A language model with an adapter beside frozen base weights; made by :func:`add_lora`.

    :param model: with ``peft`` layers in it
    :param tokenizer: its tokenizer
    :param name: what the base model was loaded from
    :param like: see :class:`LanguageModel`
    """

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model with its adapter merged into the weights, and the adapter by itself in ``adapter``.

        The directory is an ordinary checkpoint. ``peft.PeftModel.from_pretrained(base, directory / "adapter")``
        puts the adapter on the base model again. Merging rounds to the dtype of the base weights.
        """
        LanguageModel(self.merged(), self.tokenizer, self.name, like=self).save_pretrained(directory)
        self.save_adapter(Path(directory, FOLDER))

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter alone, as ``peft`` does."""
        from peft import get_peft_model_state_dict

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
        # Cloned, because layers that share a matrix share their adapter, and a file has each tensor once.
        named = {f"base_model.model.{name}": tensor.cpu().clone().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.model.peft_config[ADAPTER])
        config.inference_mode = True  # as peft saves it: whoever opens the adapter gets it frozen
        config.save_pretrained(str(directory))

    def merged(self) -> PreTrainedModel:
        """A plain model in which the adapter is part of the weights. What no adapter is on shares its memory."""
        model = copy_sharing_weights(self.model)
        merge_layers(model, [ADAPTER])
        model.requires_grad_(False)
        return model

    def trainable_copy(self) -> LanguageModel:
        """A plain model with weights of its own and the adapter merged into them, all of them trainable."""
        return LanguageModel(self.merged(), self.tokenizer, self.name, like=self).trainable_copy()

    def shared_in_copies(self) -> dict[int, Any]:
        """The base weights: copies of a policy need an adapter of their own, and no more."""
        memo = sharing_memo(self.model)
        return {id(p): memo[id(p)] for p in self.model.parameters() if not p.requires_grad}


def add_lora(lm: LanguageModel, lora: Lora) -> AdaptedLanguageModel:
    """A language model that shares the weights of ``lm``, frozen, and has an adapter to be trained.

    The adapter is in fp32 whatever the base is: the steps of an optimizer are too small for bf16.

    :param lm: the base; its modules and whether its weights are trainable stay as they are
    :param lora: True for the defaults, or ``peft.LoraConfig`` or its arguments as a dictionary; without
        ``target_modules`` all linear layers get an adapter but the output layer and those on which none can act.
        Layers that text never reaches, such as those of a vision tower, get none in any case. Layers that share a
        matrix share an adapter
    :raises ModuleNotFoundError: without ``peft``
    :raises ValueError: if an option is unknown or has no place here, or no layer fits ``target_modules``
    """
    options = lora_options(lora)
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if isinstance(lm, AdaptedLanguageModel):
        raise ValueError(f"language_model={lm.name} has an adapter already; give its merged() model, or no lora")
    reached = reached_layers(lm.model)
    left_out = [name for name, module in lm.model.named_modules() if _is_linear(module) and name not in reached]
    by_default = not wants_layers(lora)
    if by_default:
        left_out += [name for name, returns_tensor in reached.items() if not returns_tensor]
    try:
        model = _inject(lm, options, left_out)
    except (ValueError, TypeError, NotImplementedError) as e:
        refused = _refused_layers(lm, options, left_out) if by_default else []
        if not refused:
            raise _misfit(lm, options, e) from e
        model = _inject(lm, options, left_out + refused)
    _check_targets(lm, model, options, reached)
    cast_adapter_dtype(model, ADAPTER)
    _share_adapters(model)
    return AdaptedLanguageModel(model.eval(), lm.tokenizer, lm.name, like=lm)


def wants_layers(lora: Lora) -> bool:
    """Whether an argument says which layers get an adapter."""
    return lora_options(lora)["target_modules"] != DEFAULTS["target_modules"]


def _inject(lm: LanguageModel, options: Mapping[str, Any], left_out: list[str]) -> PreTrainedModel:
    """A copy over the same weights with adapters on its layers, but those left out."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in lm.model.named_modules() if _is_linear(module)]
    options = {**options, "exclude_modules": _excluding(options.get("exclude_modules"), left_out, layers)}
    config = LoraConfig(**options, task_type=_task_type(lm), base_model_name_or_path=lm.name)
    model = copy_sharing_weights(lm.model)
    with warnings.catch_warnings():
        # GPT-2's layers have their matrices transposed; peft notices and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", ".*`tie_word_embeddings=True`")  # refused elsewhere
        if "rank_pattern" not in options:  # peft makes one for fused experts, and then doesn't find them
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(config, model, ADAPTER)
    return model


def _excluding(given: str | list[str] | None, left_out: list[str], layers: list[str]) -> str | list[str] | None:
    """``exclude_modules`` for ``peft``, which takes names or a regular expression, with more of the layers in it."""
    if not left_out:
        return given
    patterns = [given] if isinstance(given, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in given or ()]
    for name in left_out:
        # Most often the same is left out in each of a list of blocks, which are called by numbers.
        blocks = re.sub(r"(?<=\.)\d+(?=\.)", "NUMBER", name)
        everywhere = re.escape(blocks).replace("NUMBER", r"\d+")
        alike = [layer for layer in layers if re.fullmatch(everywhere, layer)]
        patterns.append(everywhere if set(alike) <= set(left_out) else re.escape(name))
    return "|".join(f"(?:{pattern})" for pattern in dict.fromkeys(patterns))


def _refused_layers(lm: LanguageModel, options: Mapping[str, Any], left_out: list[str]) -> list[str]:
    """Linear layers that ``peft`` takes no adapter for, such as the last one of a Mamba layer; found by trying.

    Fused kernels read the weights of such layers without calling them, and the adapter would not act.
    """
    names = [name for name, module in lm.model.named_modules() if _is_linear(module) and name not in left_out]
    refused = []
    for kind in sorted({name.rpartition(".")[2] for name in names}):
        alike = [name for name in names if name.rpartition(".")[2] == kind]
        try:
            _inject(lm, {**options, "target_modules": [kind]}, left_out)
        except (ValueError, TypeError, NotImplementedError):
            refused += alike
    return refused if len(refused) < len(names) else []


def _misfit(lm: LanguageModel, options: Mapping[str, Any], error: Exception) -> ValueError:
    message = (
        f"lora: target_modules={options['target_modules']!r} does not fit language_model={lm.name} "
        f"({type(lm.model).__name__}): {error}. Its linear layers are called {', '.join(_linear_layers(lm.model))}"
    )
    return ValueError(message)


@torch.no_grad()
def reached_layers(model: PreTrainedModel) -> dict[str, bool]:
    """The linear layers that text may go through, and whether each returns one tensor, as an adapter on it would.

    A few tokens go through the model. What they don't reach, such as the towers of a model that sees and hears, is left
    out, but for parts of which each text takes a few: the experts of a list of which others are reached.
    """
    called: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: called.update({name: isinstance(output, torch.Tensor)})

    parts = dict(model.named_modules())
    hooks = [module.register_forward_hook(note(name)) for name, module in parts.items() if name]
    try:
        size = model.config.get_text_config().vocab_size
        ids = torch.arange(TOKENS, device=model.device)[None] % size
        model(**model_inputs(model, ids, TOKENS // 2), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    live = {name[:at] for name in called for at in _dots(name)}  # with all they stand in
    reached = {}
    for name, module in parts.items():
        if _is_linear(module):
            steps = [name[:at] for at in _dots(name)]
            dead = next((step for step in steps if step not in live), None)
            if dead is None or isinstance(parts[dead.rpartition(".")[0]], nn.ModuleList | nn.ModuleDict):
                reached[name] = called.get(name, True)
    return reached


def _dots(name: str) -> list[int]:
    """Where the names end of what a module stands in, from the outside in, and its own."""
    return [at for at, letter in enumerate(name) if letter == "."] + [len(name)]


def _share_adapters(model: nn.Module) -> None:
    """Let layers that share a matrix share an adapter: so it can be merged, and a layer repeated is still repeated."""
    first: dict[int, Any] = {}
    for _, layer in _adapted_layers(model):
        same = first.setdefault(id(adapted_weight(layer)), layer)
        if same is not layer:
            for part in layer.adapter_layer_names:
                setattr(layer, part, getattr(same, part))


def _task_type(lm: LanguageModel) -> str:
    """What ``peft`` calls the kind of model that the adapter belongs to."""
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(lm.model.config) else "CAUSAL_LM"


def wants_lora(lora: Lora) -> bool:
    """Whether an argument asks for an adapter; an empty dictionary does, for the default one."""
    return lora is not None and lora is not False


def lora_options(lora: Lora) -> dict[str, Any]:
    """The options of an adapter as plain data, defaults filled in.

    :param lora: what :func:`add_lora` takes
    :raises ModuleNotFoundError: without ``peft``
    :raises TypeError: if it is none of these
    :raises ValueError: if an option is unknown or has no place here
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError('lora needs the package peft: pip install "textgym[lora]"')
    from peft import LoraConfig

    if lora is True:
        given: dict[str, Any] = {}
    elif isinstance(lora, LoraConfig):
        metadata = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
        untouched = LoraConfig()
        given = {
            field.name: getattr(lora, field.name)
            for field in dataclasses.fields(lora)
            if field.name not in metadata and getattr(lora, field.name) != getattr(untouched, field.name)
        }
        given = {"r": lora.r, "lora_alpha": lora.lora_alpha, **given}
    elif isinstance(lora, Mapping):
        given = dict(lora)
    else:
        raise TypeError(f"lora={lora!r} must be True, a dictionary of peft.LoraConfig's arguments, or a LoraConfig")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, OPTIONS)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(OPTIONS)}"
            raise ValueError(f"lora has no option {name!r}; {hint}")
        if name not in OPTIONS:
            raise ValueError(
                f"lora: {name}={value!r} can't be used here: only the adapter is trained, it begins at the base model, "
                f"and dropout never acts; the options are {', '.join(OPTIONS)}"
            )
    options = {**DEFAULTS, **{name: _plain(value) for name, value in given.items() if value is not None}}
    start = options.get("init_lora_weights", True)
    if not any(start is allowed or (isinstance(start, str) and start == allowed) for allowed in STARTS_AT_BASE):
        raise ValueError(
            f"lora: init_lora_weights={start!r} doesn't begin at the base model or changes its weights; "
            f"give one of {', '.join(map(repr, STARTS_AT_BASE))}"
        )
    rank = options["r"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora: r={rank!r} must be a whole number, at least 1")
    return options


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset | tuple) else value


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _linear_layers(model: nn.Module) -> list[str]:
    """The names, without what they stand in, of linear layers."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    return sorted(linear)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _check_targets(
    lm: LanguageModel, model: PreTrainedModel, options: Mapping[str, Any], reached: Mapping[str, bool]
) -> None:
    """An adapter acts where a layer is called, and is merged into a weight that may be used elsewhere, too.

    :raises ValueError: if that is not the same
    """
    adapted = dict(_adapted_layers(model))
    targets = f"lora: target_modules={options['target_modules']!r} includes"
    for name in adapted:
        if not reached.get(name, True):
            raise ValueError(
                f"{targets} {name}, which returns more than one tensor in language_model={lm.name}, and peft's layers "
                f"return one; leave it out (exclude_modules=[{name.rpartition('.')[2]!r}])"
            )
    users: dict[int, list[str]] = {}
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for names in users.values():
        with_adapter = [name for name in names if name in adapted]
        if with_adapter and len(with_adapter) < len(names):
            other = next(name for name in names if name not in adapted)
            raise ValueError(
                f"{targets} {with_adapter[0]}, whose weights language_model={lm.name} uses in {other}, too, which gets "
                "no adapter; leave it out"
            )

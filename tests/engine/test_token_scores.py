"""The scores of tokens with a backward pass of their own, against torch's autograd over the formula."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from textgym import language_model
from textgym.engine import token_scores
from textgym.engine.token_scores import TokenScores, is_plain_linear
from textgym.language_model import log_distribution

ROWS, WIDTH, VOCABULARY = 11, 16, 60


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights, tokens and which tokens are allowed."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    tokens = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    allowed = torch.rand(ROWS, VOCABULARY, generator=generator) < 0.4
    allowed[range(ROWS), tokens] = True
    return hidden, weight, tokens, allowed


def by_autograd(hidden: Tensor, weight: Tensor, tokens: Tensor, scale: float, allowed: Tensor | None):
    log_probs = torch.log_softmax((scale * hidden @ weight.T).masked_fill(~allowed, -torch.inf), -1) if (
        allowed is not None
    ) else torch.log_softmax(scale * hidden @ weight.T, -1)  # fmt: skip
    entropy = torch.distributions.Categorical(logits=log_probs).entropy()
    return log_probs[range(ROWS), tokens], entropy


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 10**6])
def test_log_probs_entropies_and_gradients_are_those_of_autograd(monkeypatch, scale, masked, chunk):
    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", chunk)
    hidden, weight, tokens, allowed = inputs(torch.float32)
    mask = allowed if masked else None
    factors = torch.linspace(-1, 2, ROWS)
    log_probs, entropies = TokenScores.apply(hidden, weight, tokens, scale, mask)
    assert not entropies.requires_grad
    got = torch.autograd.grad((factors * log_probs).sum(), (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected_log_probs, expected_entropies = by_autograd(*exact, tokens, scale, mask)
    expected = torch.autograd.grad((factors.double() * expected_log_probs).sum(), exact)
    torch.testing.assert_close(log_probs.double(), expected_log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), expected_entropies, atol=1e-5, rtol=1e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


def test_under_autocast_products_are_bfloat16_and_gradients_have_the_weights_type():
    hidden, weight, tokens, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = TokenScores.apply(hidden, weight, tokens, 1.0, None)
        logits = nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(log_probs, log_distribution(logits).gather(1, tokens[:, None])[:, 0])
    got = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    expected = torch.autograd.grad(by_autograd(hidden, weight, tokens, 1.0, None)[0].sum(), (hidden, weight))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_second_derivative_is_an_error():
    hidden, weight, tokens, _ = inputs(torch.float32)
    log_probs, _ = TokenScores.apply(hidden, weight, tokens, 1.0, None)
    with pytest.raises(RuntimeError, match="create_graph=True: .* token_log_probs has one with entropy_gradient=True"):
        torch.autograd.grad(log_probs.sum(), hidden, create_graph=True)


class WideTensors(TorchDispatchMode):
    """Counts the tensors of tokens times vocabulary that are made."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        old = {arg.data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(result, Tensor) and result.numel() == ROWS * VOCABULARY and result.data_ptr() not in old:
            self.count += 1
        return result


def test_one_tensor_of_tokens_times_vocabulary_is_made_and_none_in_the_backward_pass(monkeypatch):
    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", VOCABULARY)
    hidden, weight, tokens, _ = inputs(torch.float32)
    with WideTensors() as forward:
        log_probs, _ = TokenScores.apply(hidden, weight, tokens, 0.5, None)
    with WideTensors() as backward:
        torch.autograd.grad(log_probs.sum(), (hidden, weight))
    assert (forward.count, backward.count) == (1, 0)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_without_gradients_are_those_of_autograd(monkeypatch, with_entropy, masked):
    from tiny_agents import tiny_language_model

    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", 40)
    lm = tiny_language_model()
    monkeypatch.setattr(language_model, "CPU_HEAD_ELEMENTS", 3 * lm.vocab_size)
    monkeypatch.setattr(lm, "_soft_cap", 2.0)
    weight = lm.model.get_output_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, weight.shape[1], generator=generator)
    tokens = torch.randint(lm.vocab_size, (10,), generator=generator)
    allowed = torch.rand(10, lm.vocab_size, generator=generator) < 0.5
    allowed[range(10), tokens] = True
    allowed = allowed if masked else None
    with torch.no_grad():
        log_probs, entropy = lm.token_log_probs(hidden, tokens, 0.7, allowed, with_entropy)
    capped = 2 * torch.tanh(hidden.double() @ weight.double().T / 2) / 0.7
    if masked:
        capped = capped.masked_fill(~allowed, -torch.inf)
    expected = torch.distributions.Categorical(logits=capped)
    torch.testing.assert_close(log_probs.double(), expected.log_prob(tokens), atol=1e-5, rtol=1e-5)
    assert (entropy is not None) == with_entropy
    if with_entropy:
        torch.testing.assert_close(entropy.double(), expected.entropy(), atol=1e-5, rtol=1e-5)


class Blocks(TorchDispatchMode):
    """Where the tensors of several tokens times the vocabulary lie that are made; all stay in use."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.made: list[Tensor] = []
        super().__init__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == self.vocabulary:
            self.made.append(result)
        return result

    def among(self, rows: range) -> int:
        """The number of places that hold tensors with one of these numbers of rows."""
        return len({tensor.untyped_storage().data_ptr() for tensor in self.made if len(tensor) in rows})


@pytest.mark.parametrize("autocast", [False, True])
def test_scoring_in_parts_makes_its_logits_in_one_place(monkeypatch, autocast):
    from tiny_agents import tiny_language_model

    lm = tiny_language_model()
    monkeypatch.setattr(language_model, "CPU_HEAD_ELEMENTS", 3 * lm.vocab_size)
    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", lm.vocab_size)  # one token at a time
    hidden = torch.randn(9, lm.model.get_output_embeddings().weight.shape[1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Blocks(lm.vocab_size) as blocks:
        lm.token_log_probs(hidden, torch.arange(9) % lm.vocab_size)
    assert blocks.among(range(2, 4)) == (3 if autocast else 1)  # products in another type are the head's own


def test_what_does_not_learn_has_no_gradient():
    hidden, weight, tokens, _ = inputs(torch.float32)
    log_probs, _ = TokenScores.apply(hidden, weight.detach(), tokens, 1.0, None)
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_heads_that_do_more_than_multiply_are_told_apart():
    plain = nn.Linear(4, 6, bias=False)
    hooked = nn.Linear(4, 6, bias=False)
    hooked.register_forward_hook(lambda *_: None)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False))
    replaced = nn.Linear(4, 6, bias=False)
    replaced.forward = lambda x: x @ plain.weight.T
    others = [nn.Linear(4, 6), nn.Sequential(plain), hooked, parametrized, replaced]
    assert is_plain_linear(plain)
    assert not any(is_plain_linear(head) for head in others)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_learning_takes_this_way_and_gets_the_same(monkeypatch, with_entropy):
    from tiny_agents import tiny_language_model

    lm = tiny_language_model().trainable_copy()
    width = lm.model.get_output_embeddings().weight.shape[1]
    hidden = torch.randn(9, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.arange(9) % lm.vocab_size
    used = []
    apply = TokenScores.apply
    monkeypatch.setattr(TokenScores, "apply", lambda *a: used.append(1) or apply(*a))
    results = []
    for plain in (True, False):
        monkeypatch.setattr(language_model, "is_plain_linear", lambda head, plain=plain: plain)
        log_probs, entropy = lm.token_log_probs(hidden, tokens, 0.7, None, with_entropy, entropy_gradient=False)
        assert (entropy is not None) == with_entropy
        gradients = torch.autograd.grad(log_probs.sum(), [hidden, lm.model.get_output_embeddings().weight])
        results.append([log_probs, *gradients, *([entropy] if with_entropy else [])])
    assert len(used) == 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    if with_entropy:
        assert lm.token_log_probs(hidden, tokens, entropy_gradient=True)[1].requires_grad, "then autograd's own way"

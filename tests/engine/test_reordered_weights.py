"""Decode steps with reordered weights give the same numbers up to rounding, and nothing of it stays behind."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from textgym import language_model as language_model_module
from textgym.engine import reordered_weights
from textgym.engine.reordered_weights import FEWEST_STEPS, ReorderedWeights, worth_reordering
from textgym.generation import complete

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="needs a torch with oneDNN",
)


class Operations(TorchDispatchMode):
    """Counts the operations of a context by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reordered(self) -> int:
        return self.counts["_reorder_linear_weight"]

    @property
    def products(self) -> int:
        return self.counts["_linear_pointwise"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor and however small the model."""
    monkeypatch.setattr(reordered_weights, "SMALLEST", 1)
    monkeypatch.setattr(language_model_module, "worth_reordering", lambda rows, steps: True)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(256, 192, bias=bias).requires_grad_(False)


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    """In double precision."""
    return F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 256), (33, 1, 256), (2, 100, 256)])
def test_products_are_the_same_up_to_rounding(bias, shape):
    layer, x = linear(bias), torch.randn(shape)
    with torch.no_grad(), Operations() as operations, ReorderedWeights([layer]):
        product = layer(x)
    assert operations.products == 1
    assert product.shape == (*shape[:-1], 192)
    torch.testing.assert_close(product.double(), exact(layer, x), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_how_many_there_are():
    layer, x = linear(), torch.randn(100, 256)
    with torch.no_grad(), ReorderedWeights([layer]):
        assert all(torch.equal(layer(x[:count]), layer(x)[:count]) for count in (4, 7, 16, 33, 99))


def test_weights_are_reordered_once_and_again_when_they_change_or_were_forgotten():
    layer, x = linear(), torch.randn(8, 256)
    weights = ReorderedWeights([layer])
    with torch.no_grad(), Operations() as operations:
        for _ in range(5):
            with weights:
                layer(x)
        assert operations.reordered == 1
        layer.weight.mul_(-2)
        with weights:
            torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
        assert operations.reordered == 2
        layer.weight = nn.Parameter(torch.randn(192, 256))
        with weights:
            torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
        assert operations.reordered == 3
        weights.forget()
        with weights:
            layer(x)
            layer(x)
        assert operations.reordered == 4


def test_what_they_are_not_for_is_computed_as_usual():
    layer = linear()
    layer.weight.requires_grad_()
    usual = copy.deepcopy(layer)
    with Operations() as operations, ReorderedWeights([layer]):
        x = torch.randn(8, 256)
        layer(x).sum().backward()  # a gradient is wanted
        usual(x).sum().backward()
        assert torch.equal(layer.weight.grad, usual.weight.grad)
        with torch.no_grad():
            for rows in (1, 3, 257, 1000):
                assert torch.equal(layer(torch.randn(rows, 256).fill_(0.5)), usual(torch.full((rows, 256), 0.5)))
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert operations.products == operations.reordered == 0


def test_other_layers_stay_as_they_are():
    class Special(nn.Linear):
        """Some other kind, as quantised layers are."""

    hooked = linear()
    hooked.forward = lambda x: x  # type: ignore[method-assign]  # as accelerate's hooks do
    small = nn.Linear(8, 8)
    others = [Special(256, 192), hooked, small, linear().bfloat16(), nn.Embedding(200, 256), nn.LayerNorm(256)]
    before = [dict(layer.__dict__) for layer in others]
    with ReorderedWeights(others) as _:
        assert [dict(layer.__dict__) for layer in others] == before
    assert len(ReorderedWeights(others)) == 0


def test_nothing_stays_behind_even_after_an_error():
    layer = linear()
    weights = ReorderedWeights([layer])
    with weights:
        with ReorderedWeights([layer]):  # as texts are sampled amid a rollout
            pass
        assert "forward" in layer.__dict__
    assert "forward" not in layer.__dict__
    with pytest.raises(RuntimeError), weights:
        layer(torch.randn(8, 3))
    assert "forward" not in layer.__dict__


def test_only_where_it_was_measured_to_take_less_time(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert worth_reordering(32, FEWEST_STEPS)
    assert not worth_reordering(32, FEWEST_STEPS - 1)
    assert not worth_reordering(3, FEWEST_STEPS)
    assert not worth_reordering(512, FEWEST_STEPS)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not worth_reordering(32, FEWEST_STEPS)


class Watch(BaseCallback):
    """Counts what happens in rollouts."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.operations = Operations()
        self.operations.__enter__()

    def _on_rollout_end(self) -> None:
        self.operations.__exit__(None, None, None)


@pytest.mark.parametrize("lora", [False, True])
def test_rollouts_reorder_once_and_draw_from_the_same_policy(always, lora):
    env = tiny_vector_env(8, max_new_tokens=6)
    model = tiny_ppo(env, n_steps=12, n_epochs=1, batch_size=48, policy_kwargs={"lora": lora}, learning_rate=0.01)
    layers = len(ReorderedWeights(model.policy.language_model.model.modules()))
    assert layers > 10
    watch = Watch()
    for _ in range(2):  # the second with weights that the first has changed
        model.learn(96, callback=watch, reset_num_timesteps=False)
        # Rows that begin anew join the others' steps or have a forward of their own: at least one product a step.
        assert watch.operations.reordered == layers
        assert watch.operations.products >= 12 * layers
    callback = model._setup_learn(96)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 12)
    first = next(model.rollout_buffer.get(96))
    with torch.no_grad(), Operations() as operations:
        _, log_prob, _ = model.policy.evaluate_segments(first)
    assert operations.products == 0
    torch.testing.assert_close(log_prob, first.old_log_prob, rtol=0, atol=1e-4)


def test_what_a_rollout_has_reordered_is_gone_when_the_update_begins(always):
    """A callback keeps a rollout's locals, and so would keep the weights."""
    import gc

    env = tiny_vector_env(8, max_new_tokens=6)
    model = tiny_ppo(env, n_steps=12, n_epochs=1, batch_size=48)
    watch = Watch()
    model.learn(96, callback=watch)
    assert watch.operations.reordered > 0
    gc.collect()
    assert not any(t.is_mkldnn for t in gc.get_objects() if type(t) is Tensor)


def test_completions_are_those_of_the_weights_as_they_are(always, monkeypatch):
    model = tiny_language_model()
    prompts = [[4 + i, 9, 20 + i] for i in range(8)]
    with Operations() as operations:
        reordered = complete(model, prompts, 40, min_new_tokens=40, deterministic=True)
    assert operations.products > 0
    monkeypatch.setattr(language_model_module, "worth_reordering", lambda rows, steps: False)
    with Operations() as operations:
        usual = complete(model, prompts, 40, min_new_tokens=40, deterministic=True)
    assert operations.products == 0
    assert np.array_equal(reordered, usual)


def test_compiled_steps_have_only_the_head_reordered(always):
    model = tiny_language_model()
    assert len(model.reordered_weights(8, 48)) > 10
    model.compile(decoding=True)
    assert len(model.reordered_weights(8, 48)) == 1

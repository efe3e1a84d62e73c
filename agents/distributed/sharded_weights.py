"""Weights, gradients and the optimizer's state cut into a part for each process (PyTorch's FSDP2).

A sharded model gathers the weights of a layer when it is asked for them, in all processes together. In an update that
fits: everybody makes the same number of passes. Acting does not, for a row that begins an episode is an extra forward,
and evaluation runs in one process alone. So weights are whole outside of updates, in parameters that are as good as any
(they can be saved, loaded and copied from), and sharded within them: then a layer's are gathered for its forward,
dropped, gathered again for its backward, and its gradients summed into the parts that each process keeps. What counts
as the weights at the beginning of an update are the whole ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from textgym.agents.policy.gradient_checkpointing import checkpointable_layers
from textgym.agents.policy.language_model_policy import LanguageModelPolicy


class ShardedWeights:
    """The weights of a policy, whole now and cut into parts while it is updated.

    The policy's optimizer then has the parts, its state included; ``state_dict`` and ``load_state_dict`` of it are of
    the whole state, and are to be called by all processes together.

    :param policy: with the same weights in every process; its blocks and the rest of it become FSDP modules
    :param device: where this process computes
    :param guard: calls a function in which processes exchange something, and turns the error where one is lost into a
        clear one
    :raises ValueError: if something about the policy does not go together with sharding
    """

    def __init__(
        self, policy: LanguageModelPolicy, device: torch.device, guard: Callable[..., Any] = lambda call: call()
    ) -> None:
        _check(policy)
        policy.language_model.compile(decoding=False)  # the copy that acts is what compile=True means here
        self.policy = policy
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if policy.rollout_dtype is not None:
            _ = policy.acting_model  # a copy, which can't be made of sharded modules
        names = {id(parameter): name for name, parameter in policy.named_parameters()}
        hooks = {id(table): set(table) for table in self._state_dict_hooks()}
        mesh = init_device_mesh(device.type, (self.world_size,))
        # The value head is float32 whatever the transformer is, and weights of two types can't be gathered together.
        layers = [*reversed(checkpointable_layers(policy)), policy.value_net]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(policy, mesh=mesh, reshard_after_forward=False)
        self.layers = [layer for layer in layers if isinstance(layer, FSDPModule)]
        assert isinstance(policy, FSDPModule)
        self.modules: list[FSDPModule] = [*self.layers, policy]
        for module in self.modules:
            module.set_gradient_divide_factor(1.0)  # sums: each process weighs its loss by its transitions
            module.set_force_sum_reduction_for_comms(True)
        self._fix_order_of_backward()
        self.parts: dict[str, DTensor] = dict(policy.named_parameters())  # type: ignore[arg-type]
        self._hand_over(policy.optimizer, names)

        # Calls begin at the policy, whatever its method is called; the first one makes it FSDP's root.
        policy.in_one_forward = _called  # type: ignore[assignment]
        register_fsdp_forward_method(policy, "in_one_forward")
        call: Any = policy.in_one_forward
        evaluate = policy.evaluate_segments
        policy.evaluate_segments = (  # type: ignore[method-assign]
            lambda *arguments, **options: guard(partial(call, evaluate, *arguments, **options))
        )
        call(lambda: ())
        # FSDP would cut the weights whenever a state_dict is asked for or loaded; here they stay as they are.
        for table in self._state_dict_hooks():
            for key in set(table) - hooks[id(table)]:
                del table[key]
        self.end_update()

    def _fix_order_of_backward(self) -> None:
        """Say which weights are gathered beside each backward, so that all processes gather in one order.

        Left to itself FSDP2 gathers what was called before in the last forward; for the first module of an update that
        is the last one of acting, where processes with unlike rows call more or less. Then one waits in a gather for
        the other, which waits in a reduce-scatter.
        """
        *layers, value_net = self.layers
        order: list[FSDPModule] = [self.modules[-1], value_net, *layers]
        for module, following in zip(order, [*order[1:], order[0]], strict=True):
            module.set_modules_to_backward_prefetch([following])

    def begin_update(self) -> None:
        """Cut the weights into parts.

        :raises RuntimeError: if the memory of a weight can't be given back
        """
        with torch.no_grad():
            for name, whole in self.policy.named_parameters():
                if not whole.untyped_storage().resizable():
                    raise RuntimeError(
                        f"the memory of the weight {name} is held by a NumPy array: with sharded weights (FSDP) call "
                        "detach().clone().numpy()"
                    )
                mine = self.parts[name].to_local()
                mine.copy_(self._part(whole))  # somebody may have loaded others
        for layer in self.layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for module in self.modules:
            module.reshard()

    def end_update(self) -> None:
        """Put the weights together again; all processes call it together."""
        for module in self.modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        # Gathering does not count as a change, but it is one for what was computed with them.
        torch.autograd.graph.increment_version(list(self.policy.parameters()))

    def _part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor: of its first dimension, as FSDP cuts it."""
        parts = whole.chunk(self.world_size)
        return parts[self.rank] if self.rank < len(parts) else whole[:0]

    def _state_dict_hooks(self) -> list[dict[int, Any]]:
        tables = []
        for module in self.policy.modules():
            tables += [module._state_dict_pre_hooks, module._load_state_dict_pre_hooks]
            tables.append(module._load_state_dict_post_hooks)
        return tables

    def _hand_over(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        """Give an optimizer that has no state yet the parts instead of the whole weights."""
        for group in optimizer.param_groups:
            group["params"] = [self.parts[names[id(parameter)]] for parameter in group["params"]]
        optimizer.register_state_dict_post_hook(lambda _, state: _mapped(state, _whole))
        optimizer.register_load_state_dict_pre_hook(self._cut)

    def _cut(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's whole state, with each moment like the part of the weight that it belongs to."""
        parts = [part for group in optimizer.param_groups for part in group["params"]]

        def cut(value: Any, part: DTensor) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != part.shape:
                return value
            value = value.to(part.device)
            return distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)

        cuts = {
            number: {name: cut(value, parts[number]) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": cuts}


def _check(policy: LanguageModelPolicy) -> None:
    """:raises ValueError: if something about a policy does not go together with sharding"""
    if policy.lora is not None:
        raise ValueError(
            f"lora={policy.lora!r} with sharded weights (FSDP): an adapter's gradients and state are small, and its "
            "base belongs to the reference model, too; use a configuration without FSDP, such as ddp.yaml"
        )
    if policy.compile_model and policy.rollout_dtype is None:
        raise ValueError(
            "compile=True with sharded weights (FSDP): its modules can't be compiled for acting; give a rollout_dtype, "
            "whose copy can, or compile=False"
        )
    if not type(policy.optimizer).__module__.startswith("torch."):
        raise ValueError(
            f"optimizer_class={type(policy.optimizer).__name__} with sharded weights (FSDP): only torch's own work on "
            "them, such as torch.optim.AdamW"
        )


def _called(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function returns, in tensors of their own: FSDP hangs the backward pass on them."""
    return tuple(tensor.clone() for tensor in function(*arguments, **options))


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _mapped(state: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """An optimizer's state dictionary with every value of its state changed."""
    entries = {number: {k: change(v) for k, v in entry.items()} for number, entry in state["state"].items()}
    return {**state, "state": entries}

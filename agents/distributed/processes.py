"""Training in several processes: each writes texts of its own, and all learn one model together.

``accelerate launch train.py`` (or ``torchrun``) starts a script several times, on one machine or on many. Every agent
joins the others by itself when it is made, and then trains data-parallel: rows, ``n_steps`` and ``batch_size`` are
those of one process, gradients, statistics of advantages and rewards, the KL that is controlled and the KL that ends an
update are those of all. One process alone runs the same code, in which nothing is exchanged and nothing changes.

Started with an FSDP configuration of Accelerate, they share out the optimizer's state, and in updates gradients and
weights, too (:mod:`textgym.agents.distributed.sharded_weights`).

What has to agree is exchanged in the order in which every process comes to it, so all must make the same
calls: a callback that ends training in one process has to end it in all of them.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from textgym.agents.distributed.sharded_weights import ShardedWeights
    from textgym.agents.policy.language_model_policy import LanguageModelPolicy

TIMEOUT = 1_800.0  # seconds that a process waits for the others; an evaluation or a checkpoint has to fit
BUCKET = 2**24  # numbers that are exchanged at once

Result = TypeVar("Result")


class ProcessError(RuntimeError):
    """Another process of this training ended, failed or does not answer."""


class Processes:
    """The processes that train together, seen from one of them. Made without arguments it is a process alone.

    :param rank: which one this is, from 0
    :param world_size: how many there are
    :param device: where this one computes; None leaves that open
    :param shard: whether each keeps a part only of gradients and optimizer, instead of all of it
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, device: torch.device | None = None, shard: bool = False
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.shard = shard
        self._sharded: ShardedWeights | None = None

    @classmethod
    def join(cls, timeout: float = TIMEOUT, cpu: bool = False) -> Processes:
        """The processes that ``accelerate launch`` or ``torchrun`` started, which find each other in the first call.

        :param timeout: seconds to wait for the others, then and whenever something is exchanged; of the first call
        :param cpu: compute on the CPU and exchange with gloo, even where there is a GPU; of the first call
        :raises ModuleNotFoundError: if there are several and ``accelerate`` isn't installed
        :raises ProcessError: if they don't find each other
        :raises ValueError: if they were started with FSDP in its first version
        """
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched == 1 and not (dist.is_available() and dist.is_initialized()):
            return cls()
        try:
            from accelerate import PartialState  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "training in several processes needs accelerate: pip install 'textgym[accelerate]'"
            ) from error
        # PartialState takes gloo only where it is told so, also on machines that have nothing but a CPU.
        cpu = cpu or not torch.accelerator.is_available()
        try:
            state = PartialState(cpu=cpu, timeout=datetime.timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:  # a DistStoreError is a RuntimeError
            raise ProcessError(f"the {launched} processes of this training don't find each other: {error}") from error
        if state.num_processes != max(launched, 1):
            raise ProcessError(
                f"WORLD_SIZE={launched} processes were started, but accelerate sees {state.num_processes}: start them "
                "with accelerate launch or torchrun"
            )
        device = torch.device("cpu") if cpu else state.device
        return cls(state.process_index, state.num_processes, device, _wants_fsdp())

    @staticmethod
    def leave() -> None:
        """End the connection, at the end of a script."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that logs, evaluates and saves."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"<process {self.rank} of {self.world_size}>"

    def seed(self, seed: int | None) -> int | None:
        """This process's own seed: the first one keeps ``seed``, the others get numbers far from it and each other."""
        if seed is None or self.rank == 0:
            return seed
        return int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0] >> 1)

    # Numbers

    def total(self, values: Any) -> np.ndarray:
        """Sums over the processes, in float64.

        :param values: numbers, of the same shape in each process
        """
        return self._reduced(values, dist.ReduceOp.SUM)

    def smallest(self, value: float) -> float:
        """The smallest of the processes' numbers."""
        return value if self.world_size == 1 else float(self._reduced(value, dist.ReduceOp.MIN))

    def largest(self, value: float) -> float:
        """The largest of the processes' numbers."""
        return value if self.world_size == 1 else float(self._reduced(value, dist.ReduceOp.MAX))

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes."""
        return bool(self.largest(float(flag)))

    def mean(self, values: np.ndarray) -> Any:
        """The mean over the arrays of all processes, which may have different sizes."""
        if self.world_size == 1:
            return values.mean()
        total, count = self.total([values.sum(dtype=np.float64), values.size])
        return values.dtype.type(total / count)

    def variance(self, values: np.ndarray) -> Any:
        """The biased variance over the arrays of all processes, which may have different sizes."""
        if self.world_size == 1:
            return values.var()
        squares = np.square(values.astype(np.float64) - self.mean(values.astype(np.float64)))
        return values.dtype.type(self.mean(squares))

    def moments(self, values: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number, mean and unbiased standard deviation of the values of all processes.

        :param values: ``(M,)``, M being this process's own
        """
        if self.world_size == 1:
            return len(values), values.mean(), values.std() if len(values) > 1 else torch.full_like(values.sum(), 0.0)
        wide = values.detach().double()
        total, count = self.total([wide.sum().item(), len(values)])
        mean = total / count
        squares = float(self.total((wide - mean).square().sum().item()))
        std = (squares / max(count - 1, 1)) ** 0.5
        return int(count), values.new_tensor(mean), values.new_tensor(std)

    def weighted_mean(self, value: float, weight: float) -> float:
        """The mean of a number over the processes, each with its weight."""
        if self.world_size == 1:
            return value
        total, weights = self.total([value * weight, weight])
        return float(total / weights)

    def means(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Mean over the processes of each of some figures, which have the same names in all of them."""
        if self.world_size == 1:
            return figures
        return dict(zip(figures, (self.total(list(figures.values())) / self.world_size).tolist(), strict=True))

    # Weights

    def take(self, policy: LanguageModelPolicy) -> None:
        """Give all processes the first one's weights; each keeps its part of the optimizer, where that is wished.

        :param policy: whose optimizer has not begun
        :raises ValueError: if something about the policy does not go together with sharding
        """
        self.broadcast(p for p in policy.parameters() if p.requires_grad)
        if self.shard and self.world_size > 1:
            from textgym.agents.distributed.sharded_weights import ShardedWeights

            self._sharded = self._computed(ShardedWeights, policy, self.device, self._computed)

    def begin_update(self) -> None:
        """Before an update; in between weights may be sharded."""
        if self._sharded is not None:
            self._sharded.begin_update()

    def end_update(self) -> None:
        """After an update: weights are whole again."""
        if self._sharded is not None:
            self._computed(self._sharded.end_update)

    def backward(self, loss: Tensor, policy: LanguageModelPolicy, transitions: float) -> None:
        """Compute the gradients of the mean loss over everybody's transitions.

        :param loss: mean over one's own transitions
        :param policy: whose weights they are of
        :param transitions: M, how many these are
        """
        if self._sharded is None:
            loss.backward()
            self.average_gradients(policy.parameters(), transitions)
        else:  # sums the gradients while it computes them
            share = transitions / float(self.total(transitions))
            self._computed((loss * share).backward)

    def clip_gradients(self, policy: LanguageModelPolicy, norm: float) -> float:
        """Scale a policy's gradients down to at most this norm, and return the one that they had."""
        had = self._computed(torch.nn.utils.clip_grad_norm_, policy.parameters(), norm)
        return float(had if self._sharded is None else self._computed(had.full_tensor))

    @torch.no_grad()
    def broadcast(self, parameters: Iterable[Tensor]) -> None:
        """Put the first process's weights in the place of everybody's."""
        if self.world_size > 1:
            for parameter in parameters:
                self._together(dist.broadcast, parameter.detach(), 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[torch.nn.Parameter], transitions: float) -> None:
        """Turn gradients of the mean over one's own transitions into those of the mean over everybody's.

        Exact for minibatches of different sizes: each process counts by its number of transitions.

        :param parameters: the same in every process
        :param transitions: M, how many this process's loss is the mean over
        :raises ValueError: with sharded weights, which :meth:`backward` computes gradients for
        """
        if self.world_size == 1:
            return
        if self._sharded is not None:
            raise ValueError("gradients of sharded weights (FSDP) are averaged while they are computed: use backward()")
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        # A parameter that no process used stays without gradient, and the optimizer leaves it alone.
        used = self.total([transitions, *(parameter.grad is not None for parameter in learning)])
        share = transitions / used[0]
        learning = [parameter for parameter, count in zip(learning, used[1:], strict=True) if count]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(learning, BUCKET):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients]).mul_(share)
            self._together(dist.all_reduce, flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    # Objects

    def gather(self, value: Result) -> list[Result]:
        """Everybody's value, by rank, in every process. The processes of a training trust each other: it is pickled."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        self._together(dist.all_gather_object, gathered, value)
        return gathered

    def interleaved(self, values: Sequence[Result]) -> list[Result]:
        """The values of everybody's list in one, in turn, so that its end is as mixed as its beginning."""
        missing = object()
        columns = zip_longest(*self.gather(list(values)), fillvalue=missing)
        return [value for value in chain.from_iterable(columns) if value is not missing]  # type: ignore[misc]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Let the main process do something while the others wait; everybody gets what comes of it.

        :raises ProcessError: in the others, if it failed
        """
        if self.world_size == 1:
            return work()
        result: list[Any] = [None, None]
        problem: BaseException | None = None
        if self.is_main:
            try:
                result[0] = work()
            except Exception as error:
                problem, result[1] = error, f"{type(error).__name__}: {error}"
        self._together(dist.broadcast_object_list, result, 0)
        if problem is not None:
            raise problem
        if result[1] is not None:
            raise ProcessError(f"process {self.rank} ends because the main process failed: {result[1]}")
        return result[0]

    def _reduced(self, values: Any, operation: Any) -> np.ndarray:
        numbers = np.array(values, dtype=np.float64)
        if self.world_size == 1:
            return numbers
        tensor = torch.as_tensor(numbers).to(self.device)
        self._together(dist.all_reduce, tensor, operation)
        return tensor.cpu().numpy()

    def _together(self, collective: Callable[..., Any], *arguments: Any) -> Any:
        """Exchange something."""
        try:
            return collective(*arguments)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _computed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Compute something in which weights or gradients are exchanged."""
        try:
            return function(*arguments)
        except RuntimeError as error:
            if not _is_of_the_exchange(error):
                raise
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> ProcessError:
        return ProcessError(
            f"process {self.rank} of {self.world_size} lost another one: it ended, or it did not answer in time "
            f"({str(error).splitlines()[0]})"
        )


def _wants_fsdp() -> bool:
    """Whether the processes were started with FSDP2 in Accelerate's configuration.

    :raises ValueError: if it is another version
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version: {version} in the configuration of accelerate must be 2; see fsdp2.yaml")
    return True


def _is_of_the_exchange(error: RuntimeError) -> bool:
    """Whether an error comes from the exchange and not from what was computed around it."""
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))


def _buckets(parameters: list[torch.nn.Parameter], size: int) -> list[list[torch.nn.Parameter]]:
    """Parameters in order, cut so that each part has at most ``size`` numbers or is a single one."""
    buckets: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not buckets or parameter.numel() > room:
            buckets.append([])
            room = size
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets

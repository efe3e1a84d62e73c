"""One fixed number of prompts for all processes: each takes the next that nobody has taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textgym.prompts.opening import as_prompt_source
from textgym.prompts.rows import PromptRow, PromptRows, PromptSource

if TYPE_CHECKING:
    pass

from textgym.agents.distributed.processes import Processes


class SharedPrompts(PromptSource):
    """A fixed number of prompts, divided over the processes: none comes a second time before all came once.

    The prompts stand in an endless sequence, shuffled anew for each pass over them. In every rollout the next places
    of it that nobody has taken are dealt out in turn, so processes whose texts end sooner take more of them. Where one
    runs into the next pass while another has some of this one left, these come first in the next rollout.

    :param prompts: whatever :func:`~textgym.prompts.as_prompt_source` takes, except functions
    :param seed: of the order, the same in all processes
    :param processes: default those that this one was started with
    :raises TypeError: if the prompts are made by a function; those differ by the seeds of the rows
    """

    def __init__(self, prompts: Any, seed: int = 0, processes: Processes | None = None) -> None:
        rows = as_prompt_source(prompts)
        if not isinstance(rows, PromptRows):
            raise TypeError(f"a {type(rows).__name__} has no fixed prompts to divide: pass it to the environment as is")
        self.prompts = rows
        self.seed = seed
        self.processes = Processes.join() if processes is None else processes
        self._left: list[int] = []  # places before _next that nobody took
        self._next = 0
        self._taken = 0  # by this process since the prompts were last divided
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rows(self) -> PromptRows:
        return self.prompts

    def sample(self, rng: np.random.Generator) -> PromptRow:
        """This process's next prompt; ``rng`` is not used."""
        turn = self._taken * self.processes.world_size + self.processes.rank
        self._taken += 1
        run, place = divmod(self._place(turn), len(self.prompts))
        return self.prompts[int(self._order(run)[place])]

    def divide(self) -> None:
        """Deal out what is left; all processes call it together, between two rollouts."""
        taken = self.processes.gather(self._taken)
        size = self.processes.world_size
        used = {turn * size + rank for rank, count in enumerate(taken) for turn in range(count)}
        dealt = max(max(used, default=-1) + 1, len(self._left))
        left = [self._place(turn) for turn in range(dealt) if turn not in used]
        self._next += max(dealt - len(self._left), 0)
        self._left = left
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        """Which prompts come next, for checkpoints."""
        return {"left": list(self._left), "next": self._next, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._left, self._next, self._taken = list(state["left"]), state["next"], state["taken"]

    def _place(self, turn: int) -> int:
        """The place in the sequence of what is dealt out in some turn."""
        return self._left[turn] if turn < len(self._left) else self._next + turn - len(self._left)

    def _order(self, run: int) -> np.ndarray:
        """``(n,)`` the order of the prompts in one pass over them."""
        if run not in self._orders:
            self._orders = {old: order for old, order in self._orders.items() if old >= run - 1}
            self._orders[run] = np.random.default_rng((self.seed, run)).permutation(len(self.prompts))
        return self._orders[run]


class DividePrompts(BaseCallback):
    """Divide :class:`SharedPrompts` before each rollout, and keep in checkpoints which come next.

    :param prompts: what the environment draws from
    """

    def __init__(self, prompts: SharedPrompts) -> None:
        super().__init__()
        self.prompts = prompts

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.prompts.divide()

    def state_dict(self) -> dict[str, Any]:
        return self.prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state)

"""Infos of N rows in the form of Gymnasium's vector environments."""

from __future__ import annotations

from typing import Any

import numpy as np


class VectorInfos:
    """Collects infos: an array per key, and beside it under ``_key`` a mask of the rows that have it.

    :param num_rows: N
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.values: dict[str, Any] = {}

    def put(self, name: str, rows: np.ndarray, values: Any, dtype: Any = np.float64) -> None:
        """Set the info of some rows.

        :param rows: ``(B,)``
        :param values: B values, or an array ``(B, ...)``
        :param dtype: of the array; ``object`` for texts, whose gaps are None, as Gymnasium has it
        """
        if not len(rows):
            return
        if dtype is object:
            array = np.empty(len(rows), dtype=object)
            array[:] = values
        else:
            array = np.asarray(values, dtype=dtype)
        if name not in self.values:
            gap = None if dtype is object else 0
            self.values[name] = np.full((self.num_rows, *array.shape[1:]), gap, dtype=dtype)
        self.values[name][rows] = array
        self.values.setdefault(f"_{name}", np.zeros(self.num_rows, dtype=bool))[rows] = True

    def move_to_final(self, rows: np.ndarray, observations: list[dict[str, np.ndarray]]) -> None:
        """Take what finished rows have into ``final_info``, and their last observations into ``final_obs``.

        :param rows: ``(B,)`` rows that begin anew in the same step
        :param observations: their B last observations
        """
        final = VectorInfos(self.num_rows)
        for name in [key for key in self.values if not key.startswith("_")]:
            values, has = self.values[name], self.values[f"_{name}"]
            kind = object if values.dtype == object else values.dtype
            mine = rows[has[rows]]
            final.put(name, mine, values[mine], kind)
            has[mine] = False
            values[mine] = None if kind is object else 0
            if not has.any():
                del self.values[name], self.values[f"_{name}"]
        last = np.full(self.num_rows, None, dtype=object)
        for row, observation in zip(rows.tolist(), observations, strict=True):
            last[row] = observation
        finished = np.zeros(self.num_rows, dtype=bool)
        finished[rows] = True
        self.values.update(final_obs=last, _final_obs=finished, final_info=final.values, _final_info=finished.copy())

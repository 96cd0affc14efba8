"""Batches that a GPU's memory does not hold are run in pieces that it does hold. Knows no GPU itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from modelserve.errors import OutOfMemory
from modelserve.signature.batches import check_outputs
from modelserve.types import Array, Columns, row_count


class Halving:
    """Runs a batch whole, or in halves of halves once the memory was too small for it.

    ``run`` answers a batch, ``out_of_memory`` is what it raises when the memory does not suffice, ``free`` gives back
    what the framework keeps of it. The largest piece that may still fit is remembered: no later piece has more rows.
    """

    def __init__(
        self, run: Callable[[Columns], dict[str, Array]], out_of_memory: type[Exception], free: Callable[[], None]
    ) -> None:
        self._run = run
        self._out_of_memory = out_of_memory
        self._free = free
        self.most_rows: int | None = None

    def __call__(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch. Raises ``OutOfMemory`` when not even one row fits."""
        rows = row_count(columns)
        pieces: list[dict[str, Array]] = []
        done = 0
        while done < rows or not pieces:
            taken = rows - done if self.most_rows is None else min(rows - done, self.most_rows)
            piece = (
                columns if taken == rows else {name: column[done : done + taken] for name, column in columns.items()}
            )
            outputs = self._attempt(piece)
            if outputs is None:
                self._remember(taken)
                continue
            if taken < rows:
                check_outputs(outputs, taken)
            pieces.append(outputs)
            done += taken
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _attempt(self, piece: Columns) -> dict[str, Array] | None:
        try:
            return self._run(piece)
        except self._out_of_memory:
            pass
        # Only after the except block: until it ends, the traceback holds on to the tensors that filled the memory.
        self._free()
        return None

    def _remember(self, too_many: int) -> None:
        if too_many <= 1:
            raise OutOfMemory(
                "the memory of the GPU does not hold a single row of this model; free some of it, or use a larger GPU"
            )
        self.most_rows = (too_many + 1) // 2


def _joined(pieces: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

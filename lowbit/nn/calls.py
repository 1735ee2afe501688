"""Which call of a layer this is: what its random bits depend on."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Calls:
    """Numbers the calls of a layer, so that each backward pass has its own random bits.

    Gradient checkpointing calls a layer twice for one step, and must give the gradients it would give without: the
    recomputed call, known by running inside a backward pass, gets the number of the call that it repeats. With
    `use_reentrant=False` the first call's own autograd node runs backward, so nothing is needed. With
    `use_reentrant=True` the first call ran without a graph and left only a note here: its number and a checksum of its
    input, by which the repeated call finds it, in whatever order a layer used several times is called again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.without_graph: deque[tuple[int, Tensor]] = deque(maxlen=256)  # not all are repeated: some only evaluate

    def number(self, x: Tensor, training: bool) -> int:
        """The number of this call. Evaluation, which leads to no gradient, does not count."""
        graph = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() != -1:  # how torch.utils.checkpoint itself knows
            return self._repeated(x)
        if training or graph:
            self.count += 1
            if not graph:
                self.without_graph.append((self.count, _checksum(x)))
        return self.count

    def _repeated(self, x: Tensor) -> int:
        notes = self.without_graph
        found = len(notes) - 1
        if len(notes) > 1:
            checksum = _checksum(x)
            same = (
                i for i in range(found, -1, -1) if notes[i][1].device == x.device and torch.equal(notes[i][1], checksum)
            )
            found = next(same, found)
        if found < 0:
            return self.count
        number = notes[found][0]
        del notes[found]
        return number


def _checksum(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int16).sum()  # stays on its device: nothing waits for it

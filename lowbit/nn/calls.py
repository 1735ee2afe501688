"""Which call of a layer this is: what its random bits depend on."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Calls:
    """Numbers the calls of a layer, so that each backward pass has its own random bits.

    Gradient checkpointing calls a layer twice for one step, and must give the gradients it would give without: the
    repeated call, known by running inside a backward pass, gets the number of the call that it repeats. A call that may
    be repeated leaves a note, its number and a checksum of its input, by which the repeated call finds it, in whatever
    order a layer used several times is called again. With `use_reentrant=True` such a call runs without a graph; with
    `use_reentrant=False` it runs under hooks on what it saves.
    """

    def __init__(self, layer: int) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device="cpu")  # a tensor, so that compiled graphs can count
        self.layer = torch.tensor(layer, device="cpu")  # … and that those of other layers are the same graphs
        self.notes: deque[tuple[int, Tensor]] = deque(maxlen=256)  # not all are repeated: some only evaluate

    def number(self, x: Tensor, training: bool) -> int:
        """The number of this call. Evaluation, which leads to no gradient, does not count."""
        graph = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() != -1:  # how torch.utils.checkpoint itself knows
            return self._repeated(x)
        if training or graph:
            self.count += 1
            if not graph or _hooked():
                self.notes.append((int(self.count), _checksum(x)))
        return int(self.count)

    def traced(self, training: bool) -> Tensor:
        """The numbers of this call and of its layer, in a graph that a compiler traces: int64 [2]."""
        if training or torch.is_grad_enabled():
            self.count += 1
        return torch.stack((self.count, self.layer))

    def _repeated(self, x: Tensor) -> int:
        notes = self.notes
        found = len(notes) - 1
        if len(notes) > 1:
            checksum = _checksum(x)
            same = (
                i for i in range(found, -1, -1) if notes[i][1].device == x.device and torch.equal(notes[i][1], checksum)
            )
            found = next(same, found)
        if found < 0:
            return int(self.count)
        number = notes[found][0]
        del notes[found]
        return number


def _hooked() -> bool:
    """Whether something, such as checkpointing, looks after what is saved for backward passes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore


def _checksum(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int16).sum()  # stays on its device: nothing waits for it

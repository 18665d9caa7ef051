"""The finished masks, one bit a weight."""

import torch
from torch import Tensor, nn

from supsup_lightning import bits
from supsup_lightning.errors import MismatchError


class MaskBank(nn.Module):
    """Masks by task id, packed; part of `state_dict`, and loadable at any number of masks into an empty bank.

    Attributes:
        packed: ``(masks, ceil(weights / 8))`` uint8, in the order in which masks were added.
        tasks: ``(masks,)`` int64, the task of each row.
        counts: ``(weights,)`` int32, in how many masks a weight is on: the mean mask without unpacking the bank.

    >>> bank = MaskBank(3)
    >>> bank.add(0, torch.tensor([True, False, True]))
    >>> bank.add(7, torch.tensor([True, True, False]))
    >>> len(bank), bank.get(7).int().tolist(), bank.superpose().tolist()
    (2, [1, 1, 0], [1.0, 0.5, 0.5])
    """

    packed: Tensor
    tasks: Tensor
    counts: Tensor

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.num_weights = num_weights
        self.register_buffer("packed", torch.empty(0, -(-num_weights // 8), dtype=torch.uint8))
        self.register_buffer("tasks", torch.empty(0, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_weights, dtype=torch.int32), persistent=False)

    def __len__(self) -> int:
        return len(self.packed)

    def __contains__(self, task: int) -> bool:
        return bool((self.tasks == task).any())

    def add(self, task: int, mask: Tensor) -> None:
        """Store ``mask`` ``(weights,)`` as the mask of ``task``.

        Raises:
            KeyError: the task has a mask already; `remove` it first.
        """
        if task in self:
            raise KeyError(f"Task {task} has a mask already; remove it first.")
        if mask.shape != (self.num_weights,):
            raise ValueError(f"A mask of this bank has shape ({self.num_weights},); got {tuple(mask.shape)}.")
        mask = mask.to(self.counts.device, torch.bool)
        self.packed = torch.cat([self.packed, bits.pack(mask).unsqueeze(0)])
        self.tasks = torch.cat([self.tasks, self.tasks.new_tensor([task])])
        self.counts += mask

    def get(self, task: int) -> Tensor:
        """The mask of ``task``, ``(weights,)`` bool. Raises `KeyError` if it has none."""
        return bits.unpack(self.packed[self._row(task)], self.num_weights)

    def remove(self, task: int) -> None:
        """Forget the mask of ``task``. Raises `KeyError` if it has none."""
        row = self._row(task)
        self.counts -= bits.unpack(self.packed[row], self.num_weights).int()
        kept = torch.arange(len(self), device=self.packed.device) != row
        self.packed, self.tasks = self.packed[kept], self.tasks[kept]

    def merge(self, other: "MaskBank") -> None:
        """Add every mask of ``other``, as from training on several machines.

        Raises:
            KeyError: a task has a mask in both banks and the two differ. Nothing is merged then.
        """
        if other.num_weights != self.num_weights:
            raise MismatchError(f"A bank over {other.num_weights} weights cannot join one over {self.num_weights}.")
        mine = dict(zip(self.tasks.tolist(), self.packed, strict=True))
        theirs = dict(zip(other.tasks.tolist(), other.packed.to(self.packed.device), strict=True))
        clashes = [task for task, row in theirs.items() if task in mine and not torch.equal(row, mine[task])]
        if clashes:
            raise KeyError(f"Tasks {clashes} have different masks in the two banks; remove one of each first.")
        for task, row in theirs.items():
            if task not in mine:
                self.add(task, bits.unpack(row, self.num_weights))

    def superpose(self, coefficients: Tensor | None = None) -> Tensor:
        """``sum_i a_i M_i``, ``(weights,)`` float32.

        Args:
            coefficients: ``(masks,)``, in the order of `tasks`; by default ``1 / masks`` each, read off `counts`.
        """
        if not len(self):
            raise KeyError("The bank is empty: there is no mask to superpose yet.")
        if coefficients is None:
            return self.counts / len(self)
        return bits.weighted_sum(self.packed, coefficients, self.num_weights)

    def project(self, vector: Tensor) -> Tensor:
        """Inner product of each mask with ``vector`` ``(..., weights)``, as ``(..., masks)``."""
        return bits.dot(self.packed, vector)

    def sparsity(self) -> Tensor:
        """Measured share of weights switched off, ``(masks,)``."""
        return 1 - self.project(torch.ones(self.num_weights, device=self.packed.device)) / self.num_weights

    def _row(self, task: int) -> int:
        rows = (self.tasks == task).nonzero()
        if not len(rows):
            raise KeyError(f"Task {task} has no mask; the bank holds {len(self)} tasks.")
        return int(rows[0])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Buffers grow, so loading first takes on the stored number of masks; the default would refuse the size.
        packed = state_dict.get(prefix + "packed")
        if packed is not None:
            if packed.shape[1] != self.packed.shape[1]:
                raise MismatchError(
                    f"The stored bank has {packed.shape[1]} bytes a mask, this network needs {self.packed.shape[1]}: "
                    "it was made with another network."
                )
            self.packed = self.packed.new_empty(packed.shape)
            self.tasks = self.tasks.new_empty(len(packed))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.counts.copy_(self._count())

    def _count(self) -> Tensor:
        counts = torch.zeros_like(self.counts)
        for row in self.packed:  # one at a time: the bank unpacked would be eight times its size
            counts += bits.unpack(row, self.num_weights)
        return counts

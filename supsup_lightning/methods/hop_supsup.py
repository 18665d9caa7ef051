"""HopSupSup: masks kept implicitly, in one Hopfield memory whose size does not grow with the tasks (section 3.5)."""

import logging
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning import bits
from supsup_lightning.bank import MaskBank, codec
from supsup_lightning.bank.hopfield_memory import Descent, HopfieldMemory, Loss, Recovery, capacity, recover
from supsup_lightning.bank.layer_statistics import LayerStatistics, layer_statistics
from supsup_lightning.bank.rows import check_names
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.layout import ByName, Layout
from supsup_lightning.masks import MaskOptions
from supsup_lightning.methods.frozen_network import FrozenNetworkMethod, mask_options
from supsup_lightning.methods.method import Part
from supsup_lightning.recipe.recorded import recorded

logger = logging.getLogger(__name__)

GAINS = ByName(include=("*weight",), min_dimensions=1, max_dimensions=1)

# A matrix of so many units takes a gigabyte.
_MOST_UNITS = 2**14


def _check_vector(name: str, shape: tuple[int, ...]) -> None:
    """Raise `ConfigurationError` if a parameter cannot be a block of a memory."""
    size, remedy = prod(shape), "Choose others with mask.include and mask.exclude (print_masked=true shows them)"
    if len(shape) > 1:
        raise ConfigurationError(
            f"A Hopfield memory keeps masks of vectors; {name} has shape {shape}. {remedy}, or mask.max_dimensions=1."
        )
    if size < 2:
        raise ConfigurationError(f"The parameter {name} has a single value, and a Hopfield memory needs two. {remedy}.")
    if size > _MOST_UNITS:
        raise ConfigurationError(
            f"The parameter {name} has {size:,} values, whose Hopfield matrix would take {4e-9 * size**2:,.1f} GB; at "
            f"most {_MOST_UNITS:,} are taken. {remedy}, such as the gains of normalisation layers."
        )


@recorded
class HopSupSup(FrozenNetworkMethod):
    """One frozen network; a task is a mask over vectors (by default normalisation gains) in a Hopfield memory.

    A finished mask ``m`` is stored as the pattern ``2 m - 1``, a block for each masked parameter, and no list of masks
    is kept to look it up in: `HopfieldRecovery` finds it again from images. So there is no finished task by number, and
    tasks have to come in order. Layers normalise by the batch at hand, as running statistics would grow with the tasks.

    Args:
        network: any module. Its weights of two or more dimensions are overwritten with random ones (``weights``).
        memory: rule of the memory: ``storkey`` or ``hebbian``.
        mask: options of masks, or as keywords, as for `SupSup`; by default gains are masked, that is vectors named
            weight.
        weights: the base weights: ``signed_constant`` or ``kaiming_normal``, regrown from the seed; ``keep`` leaves the
            network's own.
        store_weights: put weights and gains into checkpoints and files. Otherwise a checksum stands for them.
        seed: of weights and scores.

    Attributes:
        reference: the masks themselves, for reports alone; in checkpoints, but not in the file that `save` writes.

    Raises:
        ConfigurationError: an option out of its range, no vector to mask, or one whose matrix would be too large.

    >>> method = HopSupSup(nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8, bias=False)))
    >>> method.begin_task(0)
    >>> method(torch.ones(1, 4), 0).shape
    torch.Size([1, 8])
    >>> method.finish_task(0)
    >>> len(method.memory), method.task_bytes(), method.memory.num_bytes()
    (1, 0, 176)
    """

    file_format = codec.HOPFIELD_MEMORY
    _keeps_statistics = False

    def __init__(
        self,
        network: nn.Module,
        *,
        memory: str = "storkey",
        mask: MaskOptions | None = None,
        weights: str = "signed_constant",
        store_weights: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        mask = mask_options(mask, options)
        if mask.searches:
            raise ConfigurationError("mask.sparsity=auto is for method=supsup alone; give a share in [0, 1).")
        layout = Layout.of(network, mask.is_masked or GAINS)
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            _check_vector(name, shape)
        super().__init__(
            network,
            layout=layout,
            drawn=Layout.choosing(network, lambda name, p: p.ndim >= 2 and name not in layout.names),
            mask=mask,
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.memory = HopfieldMemory(layout.sizes, rule=memory)
        self.reference = MaskBank(layout.num_weights)
        self.identity["memory"] = memory

    # A task's life.

    def begin_task(self, *tasks: int) -> None:
        """Start from scores drawn from (seed, task). Raises `ConfigurationError` for any task but the next."""
        (task,) = tasks
        if task != len(self.memory):
            raise ConfigurationError(
                f"Task {task} cannot begin: a Hopfield memory numbers tasks by the order in which they are stored, and "
                f"the next is {len(self.memory)}. To train anew, make a new method; to go on, resume from a checkpoint."
            )
        self.live.begin(tasks, [self._drawn_scores(task)])

    def finish_task(self, *tasks: int) -> None:
        """Store the mask in the memory, from which it cannot be removed again."""
        self._check_finished(tasks)
        (task,) = tasks
        mask = self.rule(self.live.values[0]) > 0
        if len(self.reference) == task:  # not where earlier masks came from a file, which has none
            self.reference.add(task, mask)
        self.memory.store(mask * 2.0 - 1)
        self.live.end()

    def _in_training(self, values: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        return self.live_parameters(values)  # layers normalise by the batch

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits ``(batch, output_size)`` of the task in training, normalised by the batch."""
        return self.base.call_superposed(self.effective(task), images)

    def forward_live(self, images: Tensor) -> Tensor:
        """Logits ``(1, batch, output_size)`` of images ``(1, batch, *shape)`` of the task in training."""
        return self(images.squeeze(0), self.live.task).unsqueeze(0)

    def logits(self, state: Tensor, images: Tensor) -> Tensor:
        """``(batch, output_size)`` under a state of the memory ``(weights,)`` in [-1, 1], differentiable in it.

        -1 switches a weight off, +1 on; between them it is scaled.
        """
        return self.base.call_superposed(self.layout.split((1 + state) / 2 * self.frozen), images)

    def recover(self, loss: Loss, *, descent: Descent) -> Recovery:
        """The stored mask that a loss of a state ``(weights,)`` points to."""
        return recover(self.memory, loss, descent=descent)

    @property
    def tasks(self) -> Tensor:
        """``(k,)`` int64, 0 to ``k - 1``."""
        return torch.arange(len(self.memory), device=self.live.values.device)

    def reference_masks(self) -> Tensor:
        """The masks themselves, for reports: ``(k, weights)`` bool; ``(0, weights)`` once a file was loaded."""
        return bits.unpack(self.reference.packed, self.layout.num_weights)

    def load_reference(self, reference: dict[str, Tensor], *, memory: Mapping[str, Tensor], source: str) -> None:
        """Load the masks themselves, which no file of `save` has, from a checkpoint's state.

        Args:
            reference: state of ``reference``.
            memory: state of ``memory`` beside it, which has to be this one.
            source: the checkpoint, for messages.

        Raises:
            MismatchError: the checkpoint is of another memory.
        """
        own = self.memory.state_dict()
        if own.keys() != memory.keys() or not all(torch.equal(value, memory[name]) for name, value in own.items()):
            raise MismatchError(f"{source} is of another run than the Hopfield memory here; take that run's own.")
        self.reference.check_state(reference)
        self.reference.load_state_dict(reference)

    def nearest(self, state: Tensor) -> int:
        """Finished task whose mask is nearest to a state; -1 if the masks are unknown."""
        if not len(self.reference):
            return -1
        # <2 M - 1, z> is largest where <M, z> is.
        return int(self.reference.project(state).argmax())

    # What is kept.

    @property
    def depends_on_earlier(self) -> str:
        """The memory, which all tasks share."""
        return "all masks of method=hopfield are in one memory, which cannot be put together from several"

    def check_num_tasks(self, num_tasks: int) -> None:
        """Warn if there are more tasks than the memory can hold."""
        for name, size in zip(self.layout.names, self.layout.sizes, strict=True):
            if num_tasks > capacity(size, self.memory.rule):
                logger.warning(
                    "data.num_tasks=%d is more than the %.0f random masks that a %s memory of %d units (%s) holds by "
                    "theory: masks will be lost.",
                    num_tasks,
                    capacity(size, self.memory.rule),
                    self.memory.rule,
                    size,
                    name,
                )
                return

    def sparsity(self) -> Tensor:
        """Share of weights that each mask switches off, ``(k,)``; the mean of all if the masks are unknown."""
        k = len(self.memory)
        if len(self.reference):
            return self.reference.sparsity()
        return (0.5 - self.memory.mean().mean() / 2).expand(k)

    def task_bytes(self) -> int:
        """0, as the memory has the same size for any number of tasks."""
        return 0

    def details(self) -> dict[str, Any]:
        """Bytes of the memory, compared with explicit masks."""
        explicit = -(-self.layout.num_weights // 8)
        return {
            "memory_bytes": self.memory.num_bytes(),
            "explicit_bytes_per_task": explicit,
            "smaller_from_num_tasks": self.memory.num_bytes() // explicit + 1,
            "capacity": round(min(capacity(size, self.memory.rule) for size in self.layout.sizes)),
        }

    def parts(self) -> list[Part]:
        """Parameters and buffers in the network's order; the density is that of task 0's mask before training."""
        masks = self.layout.split(self.rule(self._drawn_scores(0)))
        parts = []
        for name, tensor in self.network.state_dict().items():
            masked = name in masks
            density = masks[name].mean().item() if masked else None
            parts.append(Part(name, tuple(tensor.shape), "implicit" if masked else "frozen", density, 0.0))
        return parts

    def layer_statistics(self) -> list[LayerStatistics]:
        """Density and overlap of the masks, one entry per masked parameter; none once a file was loaded."""
        return layer_statistics(self.reference, self.layout) if len(self.reference) else []

    def _learned(self) -> dict[str, Tensor]:
        """The memory."""
        return codec.prefixed("memory.", self.memory.packed())

    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        blocks = {f"memory.triangle_{block}" for block in range(len(self.memory.sizes))}
        check_names(tensors, {*blocks, "memory.total", "memory.num_patterns"})
        self.memory.check_state(codec.under("memory.", tensors))

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        """Load the memory; the masks themselves are unknown then."""
        self.memory.unpack(codec.under("memory.", tensors))
        self.reference.load_state_dict(MaskBank(self.layout.num_weights).state_dict())

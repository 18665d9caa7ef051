"""Base class of methods with a shared trunk and some values per task."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError, check_choice
from supsup_lightning.layout import Layout
from supsup_lightning.methods.baselines.trained_network import TrainedNetworkMethod


class TrunkMethod(TrainedNetworkMethod):
    """The first task trains the trunk together with its own row of values; later tasks train rows alone.

    Args:
        network: any module.
        trunk: ``trained`` or ``random``, that is regrown from the seed.
        shared: layout of the parameters of the trunk.
        row_size: values that a task has to itself.
        learning_rate: of a row by itself, in place of the optimizer's; None for the optimizer's.
        weights: as for `TrainedNetworkMethod`; also ``store_weights`` and ``seed``.
        store_weights: see there.
        seed: see there.
    """

    trunk_values: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        trunk: str,
        shared: Layout,
        row_size: int,
        learning_rate: float | None,
        weights: str,
        store_weights: bool,
        seed: int,
    ) -> None:
        check_choice("method.trunk", trunk, ("trained", "random"))
        if store_weights and trunk == "trained":
            raise ConfigurationError(
                "method.store_weights=true has no effect with method.trunk=trained, which is always stored; leave it "
                "out."
            )
        if learning_rate is not None and not (type(learning_rate) in (int, float) and learning_rate > 0):
            raise ConfigurationError(f"method.learning_rate={learning_rate!r} must be a positive number, or null.")
        weighted = {name for name, parameter in network.named_parameters() if parameter.ndim >= 2}
        num_shared = shared.num_weights if trunk == "trained" else 0
        super().__init__(
            network,
            num_values=row_size + num_shared,
            row_size=row_size,
            identified=tuple(name for name in shared.names if name in weighted) if trunk == "random" else (),
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.trunk = trunk
        self._needs_base = trunk == "random"  # the network's own
        self.shared = shared
        self.row_learning_rate = learning_rate
        self.register_buffer("trunk_values", torch.zeros(num_shared, dtype=torch.float32))
        self.identity["trunk"] = trunk

    @property
    def depends_on_earlier(self) -> str | None:
        """The trunk, if the first task trains it."""
        if self.trunk == "random":
            return None
        return "method.trunk=trained is trained by the first task, and later tasks rest on it (or: method.trunk=random)"

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of rows that are trained without the trunk."""
        return None if self._trains_trunk else self.row_learning_rate

    @property
    def _trains_trunk(self) -> bool:
        return self.trunk == "trained" and not len(self.finished)

    def _start(self) -> tuple[list[Tensor] | None, Tensor | None]:
        row = self._initial_row()
        values = torch.cat([row, self._initial(self.shared)]) if self._trains_trunk else row
        return [values], self.base.fresh_statistics()

    def finish_task(self, *tasks: int) -> None:
        """Store the row, and after the first task the trunk."""
        self.live.check(tasks)
        if self._trains_trunk:
            self.trunk_values.copy_(self._apart(self.live.values[0])[1].detach())
        super().finish_task(*tasks)

    def live_parameters(self, values: Tensor) -> dict[str, Tensor]:
        """Parameters by name from the row, and from the trunk while that is trained."""
        row, trunk = self._apart(values)
        return self._combined(row, self.shared.split(trunk) if self._trains_trunk else self._frozen_trunk())

    def _of(self, task: int, row: Tensor) -> dict[str, Tensor]:
        return self._combined(row, self._frozen_trunk())

    def _frozen_trunk(self) -> dict[str, Tensor]:
        if self.trunk == "trained":
            return self.shared.split(self.trunk_values)
        parameters = dict(self.network.named_parameters())
        return {name: parameters[name] for name in self.shared.names}

    def _apart(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split values into row and trunk."""
        row_size = self.finished.get_buffer("values").shape[1]
        return values[:row_size], values[row_size:]

    def _row(self, values: Tensor) -> Tensor:
        return self._apart(values)[0]

    def _is_needed(self, name: str) -> bool:
        return super()._is_needed(name) or (self._needs_base and name in self.shared.names)

    def _kept_of_trunk(self) -> tuple[str, float]:
        return ("shared" if self.trunk == "trained" else "frozen"), 0.0

    @abstractmethod
    def _initial_row(self) -> Tensor:
        """Initial row of a task, ``(row_size,)``."""

    @abstractmethod
    def _combined(self, row: Tensor, trunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name from a task's row and the trunk."""

    def _learned(self) -> dict[str, Tensor]:
        """Rows of the tasks, and the trunk if it is trained."""
        trunk = {"trunk": self.trunk_values} if self.trunk == "trained" else {}
        return {**super()._learned(), **trunk}

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        super()._set_learned(tensors)
        if self.trunk == "trained":
            self.trunk_values.copy_(tensors["trunk"])

"""Connects training to its job: run.json and SIGTERM."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from supsup_lightning.files import replacing
from supsup_lightning.runs import run_identity, stopping
from supsup_lightning.runs.run_identity import Identity

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class RecordRun(L.Callback):
    """Writes run.json, which ``resume=true`` compares with; stops a test between two batches on SIGTERM.

    It also writes .hydra, where Hydra would: a call that is refused leaves that of an earlier run as it is.

    Args:
        identity: of the run.
        config: of the run.
        folder: the output directory.
    """

    def __init__(self, identity: Identity, *, config: DictConfig, folder: Path) -> None:
        self.identity = identity
        self.config = config
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Write run.json: from here on, the directory belongs to this run."""
        if trainer.world_size > 1:  # Lightning's handler waits for the other processes, which wait for this one's step
            stopping.take_over(lambda: _note_sigterm(trainer))
        stored = run_identity.read(self.folder)
        if trainer.ckpt_path is None or stored is None or self.identity.adds_tasks(stored):
            self._write(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Write run.json for a run of an earlier version that had only its test left."""
        if not (self.folder / run_identity.FILE).exists():
            self._write(trainer, pl_module)

    def on_test_batch_end(self, *_: Any) -> None:
        """Stop on SIGTERM; in a test, Lightning checks only before the last batch of a loader."""
        stopping.raise_if_asked()

    def _write(self, trainer: L.Trainer, module: "ContinualModule") -> None:
        if trainer.is_global_zero:
            self.identity.write(
                self.folder,
                files=trainer.datamodule.files(),
                depends_on_processes=_depends_on_processes(module.method),
            )
            hydra = HydraConfig.get()
            written = {"config": self.config, "hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
            (self.folder / ".hydra").mkdir(exist_ok=True)
            for name, values in written.items():
                with replacing(self.folder / ".hydra" / f"{name}.yaml") as temporary:
                    OmegaConf.save(values, temporary)


def _note_sigterm(trainer: L.Trainer) -> None:
    """Note SIGTERM; Lightning's loop tells the other processes before each step."""
    if trainer.is_global_zero:
        trainer._signal_connector.received_sigterm = True


def _depends_on_processes(module: nn.Module) -> bool:
    """Whether a layer depends on a process's share of the batch, or on its random numbers."""
    synchronised = nn.SyncBatchNorm
    return any(
        isinstance(layer, _BatchNorm | _DropoutNd) and not isinstance(layer, synchronised) for layer in module.modules()
    )

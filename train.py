"""Train tasks one after another on one frozen network, test all of them, and write results; composed by Hydra.

python train.py data=permuted_mnist data.num_tasks=20 scenario=gnu
"""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from supsup_lightning.cli import command_line, optimized_metric
from supsup_lightning.runs import resumption, stopping
from supsup_lightning.runs.run_identity import identity_of


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def train(config: DictConfig) -> Any:
    """Run one job; returns the number or numbers that `optimized_metric` names, for sweepers."""
    with command_line.job() as folder:
        return run(config, folder)


def run(config: DictConfig, folder: Path) -> Any:
    """From the configuration to the results in ``folder``."""
    command_line.check_options(config)
    identity = identity_of(config, choices=HydraConfig.get().runtime.choices, folder=folder)
    if config.resume and not config.print_masked:
        found = resumption.find(folder, identity, config)
        if found is not None:
            return optimized_metric.value(found, config.optimized_metric)

    import lightning as L  # takes seconds, which `--help` and a mistyped option do without
    from rich.console import Console

    from supsup_lightning.callbacks.results import result_of
    from supsup_lightning.callbacks.run_record import RecordRun
    from supsup_lightning.checks.trainer_checks import check_strategy
    from supsup_lightning.recipe.recorded import record_config
    from supsup_lightning.report.summary import masked_table
    from supsup_lightning.runs.loggers import listening

    if config.print_masked:
        L.seed_everything(config.seed, workers=True, verbose=False)
        Console().print(masked_table(instantiate(config.method)))
        return None
    checkpoint = command_line.checkpoint_to_resume(config, folder / "checkpoints" / "last.ckpt")

    L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.datamodule)
    module = instantiate(config.module)
    record_config(module.method.network, config.network)
    module.plan_training(data, accelerator=config.trainer.get("accelerator", "auto"))
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    callbacks.sort(key=lambda callback: not getattr(callback, "begins_tasks", False))  # the others look at its task
    with listening(config, folder) as loggers:
        trainer = instantiate(
            config.trainer,
            max_epochs=data.num_epochs,
            callbacks=[*callbacks, RecordRun(identity, config=config, folder=folder)],
            logger=loggers or False,
            enable_progress_bar="progress" in config.callbacks,
            enable_checkpointing="checkpoint" in config.callbacks,
        )
        check_strategy(trainer)  # while there is one process
        with stopping.between_batches():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        command_line.check_finished(trainer, data)
        with stopping.between_batches():
            trainer.test(module, datamodule=data, verbose=False)
    return optimized_metric.value(result_of(trainer), config.optimized_metric)


def main() -> None:
    """The command `supsup-train`."""
    command_line.run(train)


if __name__ == "__main__":
    main()

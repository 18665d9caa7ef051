"""Train tasks one after another on one frozen network, test all of them, and write results; composed by Hydra.

python train.py data=permuted_mnist data.num_tasks=20 scenario=gnu
"""

import logging
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from supsup_lightning import command_line

logger = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def train(config: DictConfig) -> float | None:
    """Run one job; returns the average accuracy, which sweepers may maximise."""
    command_line.check_options(config)

    import lightning as L  # takes seconds, which `--help` and a mistyped option do without
    from rich.console import Console

    from supsup_lightning.loggers import listening
    from supsup_lightning.report import masked_table, read_json

    if config.print_masked:
        L.seed_everything(config.seed, workers=True, verbose=False)
        Console().print(masked_table(instantiate(config.method)))
        return None
    folder = Path(HydraConfig.get().runtime.output_dir)
    results = folder / "results.json"
    if config.resume and results.exists():
        logger.info("%s exists: nothing left to do.", results)
        return read_json(results)["average_accuracy"]
    checkpoint = command_line.checkpoint_to_resume(config, folder / "checkpoints" / "last.ckpt")

    L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.unannounced or config.data)
    module = instantiate(config.module)
    module.plan_training(data, accelerator=config.trainer.get("accelerator", "auto"))
    with listening(config, folder) as loggers:
        trainer = instantiate(
            config.trainer,
            max_epochs=data.num_epochs,
            callbacks=[instantiate(callback) for callback in config.callbacks.values()],
            logger=loggers or False,
            enable_progress_bar="progress" in config.callbacks,
            enable_checkpointing="checkpoint" in config.callbacks,
        )
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        command_line.check_finished(trainer, data)
        trainer.test(module, datamodule=data, verbose=False)
    return module.test_accuracy.compute()[0].mean().item()


def main() -> None:
    """The command `supsup-train`."""
    command_line.run(train)


if __name__ == "__main__":
    main()

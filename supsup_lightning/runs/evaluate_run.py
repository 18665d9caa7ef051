"""Test of a finished run's masks with another inference, scenario or data, without training."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from supsup_lightning.errors import DataError, MismatchError
from supsup_lightning.files import check_writable, replacing_folder
from supsup_lightning.runs import finished_run
from supsup_lightning.runs.evaluation_config import EvaluationConfig, compose_evaluation, evaluation_name
from supsup_lightning.runs.evaluation_rules import CALLBACKS
from supsup_lightning.runs.finished_run import FinishedRun
from supsup_lightning.runs.job import is_first_process
from supsup_lightning.runs.run_identity import different_files

if TYPE_CHECKING:
    from supsup_lightning.data.tasks import TaskDataModule
    from supsup_lightning.methods import HopSupSup
    from supsup_lightning.module import ContinualModule

logger = logging.getLogger(__name__)

# The measured sparsity of the masks is in results.json with six digits; on another device its last one may differ.
_TOLERANCE = 2e-6


def evaluate(folder: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Test the masks of a finished run, and write ``evaluations/<overrides>/`` in its directory.

    The run's own files are only read. An evaluation with the same overrides replaces the one before, once it is
    complete.

    Args:
        folder: output directory of the run.
        overrides: options that differ from the run's, as on the command line: ``inference=exhaustive``.

    Returns:
        Contents of the evaluation's results.json; empty in all processes but the first.

    Raises:
        DataError: no finished run, or damaged files.
        MismatchError: masks, data or configuration files that are not those of the run.
        ConfigurationError: options that do not fit, or that need another training.
    """
    run = finished_run.read(Path(folder))
    target = run.folder / "evaluations" / evaluation_name(run, overrides)
    with replacing_folder(target) if is_first_process() else nullcontext(target) as output:
        composed = compose_evaluation(run, overrides, output=output)
        if is_first_process():
            check_writable(output, "results of the evaluation")
        return _test(run, composed, overrides, output=output, target=target)


def _test(
    run: FinishedRun, composed: EvaluationConfig, overrides: Sequence[str], *, output: Path, target: Path
) -> dict[str, Any]:
    import lightning as L  # takes seconds, which a mistyped option does without

    from supsup_lightning.callbacks.evaluation import EvaluateSeenTasks
    from supsup_lightning.callbacks.evaluation_results import WriteEvaluation
    from supsup_lightning.callbacks.results import result_of
    from supsup_lightning.runs import stopping

    config, choices = composed.config, composed.choices
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.datamodule)
    other_data = [*composed.other_data, *_other_files(run, data, composed, overrides)]
    module = instantiate(config.module)
    _load(module, run)
    write = WriteEvaluation(
        folder=output,
        shown_folder=target,
        run={**{name: choices[name] for name in ("scenario", "data", "network", "method")}, "seed": config.seed},
        of_run=run.results,
        bank_path=run.bank_path,
        evaluation={
            "overrides": list(overrides),
            "inference": choices["inference"],
            "other_data": other_data,
            "run": {
                "digest": run.record["digest"],
                "scenario": run.record["choices"].get("scenario"),
                "inference": run.record["choices"].get("inference"),
                "average_accuracy": run.results["average_accuracy"],
                "task_inference_accuracy": run.results["task_inference_accuracy"],
            },
        },
        identity={"digest": composed.identity.digest, "files": data.files()},
        optimized_metric=config.optimized_metric,
    )
    shown = [instantiate(callback) for name, callback in config.callbacks.items() if name in CALLBACKS]
    trainer = instantiate(
        config.trainer,
        max_epochs=1,
        callbacks=[EvaluateSeenTasks(eval_at=[]), *shown, write],
        logger=False,
        enable_progress_bar="progress" in config.callbacks,
        enable_checkpointing=False,
    )
    with stopping.between_batches():
        trainer.test(module, datamodule=data, verbose=False)
    return result_of(trainer)


def _other_files(
    run: FinishedRun, data: "TaskDataModule", composed: EvaluationConfig, overrides: Sequence[str]
) -> list[str]:
    """Return differences from the run's files in words. Raises `MismatchError` if no other files were asked for."""
    if composed.other_data:
        return []
    different = different_files(run.record["files"], data.files())
    if different and not any(override.lstrip("+").startswith("data.root=") for override in overrides):
        raise MismatchError(
            f"The data have changed since the run in {run.folder}: {'; '.join(different)}. Put the files back, or name "
            "the folder of others to test on them (data.root)."
        )
    return different


def _load(module: "ContinualModule", run: FinishedRun) -> None:
    """Give the module the finished tasks of a run.

    Raises:
        MismatchError: a bank of another network, other options or another run.
        DataError: a damaged bank.
    """
    from supsup_lightning.methods import HopSupSup
    from supsup_lightning.report.summary import num_masks

    method = module.method
    method.load(run.bank_path)
    if isinstance(method, HopSupSup):
        _load_reference_masks(method, run)
    module.num_classes = tuple(run.results["num_classes"])
    if not module.scenario.task_known_in_training:
        learned_as: dict[str, list[int]] = run.results["learned_as"]
        module.true_tasks = {own: int(task) for task, numbers in learned_as.items() for own in numbers}
        if run.results.get("num_combinations") and module.inference.superimposes:
            logger.warning(
                "%s finds the masks that a combination is made of, not the combination; inference=exhaustive finds "
                "both.",
                type(module.inference).__name__,
            )
    here = num_masks(method), method.sparsity().mean().item()
    there = run.results["num_masks"], run.results["sparsity"]
    if here[0] != there[0] or abs(here[1] - there[1]) > _TOLERANCE:
        raise MismatchError(
            f"{run.bank_path} is not the bank that {run.folder / 'results.json'} tells of: it has {here[0]} masks of "
            f"sparsity {here[1]:.6f}, not {there[0]} of {there[1]:.6f}. Put the run's own bank there."
        )


def _load_reference_masks(method: "HopSupSup", run: FinishedRun) -> None:
    """Take the masks that are in a Hopfield memory from the checkpoint; they tell which task was found."""
    from supsup_lightning.bank import codec
    from supsup_lightning.runs.checkpoints import WholeCheckpoints

    path = run.checkpoint_path
    if not path.is_file():
        raise DataError(
            f"{path} is missing. A Hopfield memory does not tell its masks one by one, and the checkpoint alone has "
            "them to compare with; put it back, or train again."
        )
    state = codec.under("method.", WholeCheckpoints().load_checkpoint(path)["state_dict"])
    method.load_reference(codec.under("reference.", state), memory=codec.under("memory.", state), source=str(path))

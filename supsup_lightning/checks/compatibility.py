"""Checks that scenario, data, method and inference fit together, before the first step."""

from supsup_lightning.data import TaskDataModule, TaskSequence
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.inference import Inference
from supsup_lightning.inference.consistency import check_consistency
from supsup_lightning.methods import Method, SupSup
from supsup_lightning.methods.protocols import ByNumber, RecoversMasks, Superposes, TrainsOn, offer
from supsup_lightning.methods.transforms import check_transforms
from supsup_lightning.scenario import Scenario


def check_announcement(scenario: Scenario, data: TaskDataModule) -> None:
    """Raise `ConfigurationError` if the data announce tasks and the scenario hides them, or the other way round."""
    announced = isinstance(data, TaskSequence)
    if scenario.task_known_in_training and not announced:
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} each training batch comes with its task, which {type(data).__name__} "
            "does not tell; use scenario=nns, or the tasks without it."
        )
    if not scenario.task_known_in_training and announced:
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} nothing tells the task of a training batch, but "
            f"{type(data).__name__} does; wrap it: Unannounced(data)."
        )


def check_shard(method: Method, data: TaskDataModule) -> None:
    """Raise `ConfigurationError` for a shard of tasks with a method whose tasks depend on earlier ones."""
    if data.task_shard is not None and method.depends_on_earlier is not None:
        raise ConfigurationError(
            f"data.task_shard={data.task_shard} trains tasks apart from the others, but {method.depends_on_earlier}; "
            "train all tasks in one run, or use method=supsup with mask.init=random."
        )


def check_parts(scenario: Scenario, inference: Inference, method: Method) -> None:
    """Raise `ConfigurationError` for an inference that does not fit the scenario or the method."""
    name = type(method).__name__
    if scenario.task_known_at_inference and not isinstance(method, ByNumber):
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} the task is given by its number, and {name} does not offer "
            f"{offer(ByNumber)}; use {_usual_inference(method)}, or another method."
        )
    if not isinstance(method, inference.needs):
        raise ConfigurationError(
            f"{type(inference).__name__} needs {offer(inference.needs)}, which {name} does not offer; use "
            f"{_usual_inference(method)}, or another method."
        )
    for option, objective in getattr(inference, "objectives", {}).items():
        check_consistency(option, objective, method)
    if scenario.task_known_at_inference and inference.finds_task:
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} the task is known at inference, so there is nothing for "
            f"{type(inference).__name__} to find; use inference=given, or scenario=gns or gnu."
        )
    if not scenario.task_known_at_inference and not inference.finds_task:
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} the task is hidden at inference, so inference=given cannot be; "
            "use inference=discriminant, one_shot, binary or exhaustive, or scenario=gg."
        )
    if inference.measured_options and not scenario.task_known_in_training:
        option = inference.measured_options[0]
        also = " (discovery=novelty tells tasks that are new.)" if inference.finds_unknown else ""
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} no task has validation images, on which {option} is measured; use "
            f"{option}=null.{also}"
        )
    if not scenario.task_known_at_inference and not scenario.labels_shared and not inference.numbers_tasks:
        raise ConfigurationError(
            f"In scenario={scenario.name.lower()} the number of the task has to be right, which "
            f"{type(inference).__name__} does not tell; use scenario=gns."
        )


def check_outputs(inference: Inference, method: Method, data: TaskDataModule, *, output_size: int) -> None:
    """Raise `ConfigurationError` if the network has too few outputs for a task's classes, or for the inference."""
    largest = max(data.num_classes)
    if output_size < largest:
        task = data.num_classes.index(largest)
        raise ConfigurationError(
            f"network.output_size={output_size} is smaller than the {largest} classes of task {task}; "
            f"raise it to at least {largest}."
        )
    if isinstance(method, SupSup) and method.transforms:
        for images in (data.example(), *data.other_examples().values()):
            check_transforms(
                method.superfluous, method.transforms, images, output_size=output_size, num_classes=largest
            )
    layers = method.layout.names if isinstance(method, Superposes) else ()
    inference.check(output_size=output_size, num_classes=largest, layers=layers)


def check_trains_on(method: Method) -> None:
    """Raise `ConfigurationError` for a method that cannot learn from a stream without announced tasks."""
    if not isinstance(method, TrainsOn):
        raise ConfigurationError(
            f"{type(method).__name__} cannot train a finished task on, as scenario=nns needs; use method=supsup."
        )


def _usual_inference(method: Method) -> str:
    """Return an inference that the method supports, for messages about another one."""
    if isinstance(method, Superposes):
        return "inference=one_shot, binary or exhaustive"
    return (
        "scenario=gns inference=hopfield"
        if isinstance(method, RecoversMasks)
        else "inference=exhaustive, or scenario=gg"
    )

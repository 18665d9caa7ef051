"""Lightning callbacks that users switch on and off in conf/callbacks; import them from supsup_lightning.callbacks.

Order matters where one reads what another did at the same moment: `TaskBoundary`, or `TaskDiscovery` and
`RecordStream`, first.
"""

import lightning as L

from supsup_lightning.callbacks.evaluation import EvaluateSeenTasks
from supsup_lightning.callbacks.figures import DrawFigures
from supsup_lightning.callbacks.inference_record import RecordInference
from supsup_lightning.callbacks.loss_guard import LossGuard
from supsup_lightning.callbacks.progress import TaskProgress
from supsup_lightning.callbacks.recovery import RecordRecovery
from supsup_lightning.callbacks.results import WriteResults
from supsup_lightning.callbacks.stream_record import RecordStream
from supsup_lightning.callbacks.task_boundary import TaskBoundary
from supsup_lightning.callbacks.task_discovery import TaskDiscovery, boundary_or_discovery
from supsup_lightning.callbacks.task_log import LogTasks
from supsup_lightning.discovery import Discovery
from supsup_lightning.inference import Inference
from supsup_lightning.methods.protocols import RecoversMasks
from supsup_lightning.scenario import Scenario


def needed_for(scenario: Scenario, inference: Inference, *, discovery: Discovery | None = None) -> list[L.Callback]:
    """The callbacks that a `Trainer` needs, and the evaluation of tasks seen so far.

    Args:
        scenario: tells whether tasks are announced.
        inference: tells whether masks are recovered.
        discovery: how tasks are found that nothing announces (scenario NNs); by default `AccuracyDiscovery`.
    """
    begins_tasks: list[L.Callback] = [TaskDiscovery(discovery), RecordStream()]
    if scenario.task_known_in_training:
        begins_tasks = [TaskBoundary()]
    recovery = [RecordRecovery()] if inference.needs is RecoversMasks else []
    return [*begins_tasks, LossGuard(), EvaluateSeenTasks(), *recovery]


__all__ = [
    "DrawFigures",
    "EvaluateSeenTasks",
    "LogTasks",
    "LossGuard",
    "RecordInference",
    "RecordRecovery",
    "RecordStream",
    "TaskBoundary",
    "TaskDiscovery",
    "TaskProgress",
    "WriteResults",
    "boundary_or_discovery",
]

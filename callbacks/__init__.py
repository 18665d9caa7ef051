"""Lightning callbacks that users switch on and off in conf/callbacks; import them from supsup_lightning.callbacks.

Order matters where one reads what another did at the same moment: `TaskBoundary`, or `TaskDiscovery` and
`RecordStream`, first.
"""

from supsup_lightning.callbacks.evaluation import EvaluateSeenTasks
from supsup_lightning.callbacks.figures import DrawFigures
from supsup_lightning.callbacks.loss_guard import LossGuard
from supsup_lightning.callbacks.progress import TaskProgress
from supsup_lightning.callbacks.recovery import RecordRecovery
from supsup_lightning.callbacks.results import WriteResults
from supsup_lightning.callbacks.stream_record import RecordStream
from supsup_lightning.callbacks.task_boundary import TaskBoundary
from supsup_lightning.callbacks.task_discovery import TaskDiscovery, boundary_or_discovery

__all__ = [
    "DrawFigures",
    "EvaluateSeenTasks",
    "LossGuard",
    "RecordRecovery",
    "RecordStream",
    "TaskBoundary",
    "TaskDiscovery",
    "TaskProgress",
    "WriteResults",
    "boundary_or_discovery",
]

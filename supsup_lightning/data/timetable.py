"""Timetable of tasks and epochs, from the epoch's number alone, so that a resumed run continues exactly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timetable:
    """Tasks of each epoch. Tasks are trained in groups (of one, usually), once or several times ("trials").

    Attributes:
        num_tasks: number of tasks that are trained.
        epochs_per_task: epochs of one training of a task.
        trials_per_task: number of trainings per task from the start; more than one if a method searches.
        tasks_at_once: number of tasks trained in the same step.
        first_task: number of the first task that is trained: 0, or another for a part of the tasks.

    >>> times = Timetable(num_tasks=3, epochs_per_task=4, tasks_at_once=2)
    >>> times.num_epochs, list(times.tasks(3)), list(times.tasks(4)), times.ends_task(3)
    (8, [0, 1], [2], True)
    """

    num_tasks: int
    epochs_per_task: int
    trials_per_task: int = 1
    tasks_at_once: int = 1
    first_task: int = 0

    @property
    def epochs_of_task(self) -> int:
        """Number of epochs of all trainings of a task."""
        return self.trials_per_task * self.epochs_per_task

    @property
    def num_epochs(self) -> int:
        """Number of epochs of all tasks."""
        return -(-self.num_tasks // self.tasks_at_once) * self.epochs_of_task

    def tasks(self, epoch: int) -> range:
        """Tasks that are trained in this epoch."""
        first = epoch // self.epochs_of_task * self.tasks_at_once
        tasks = range(self.first_task, self.first_task + self.num_tasks)
        return tasks[first : first + self.tasks_at_once]

    def epoch_in_whole(self, epoch: int) -> int:
        """Epoch in which one training of all tasks trains these, by which layers draw their random numbers."""
        return self.first_task // self.tasks_at_once * self.epochs_of_task + epoch

    def within_task(self, epoch: int) -> int:
        """Epoch counted from the start of the current training of its task."""
        return epoch % self.epochs_per_task

    def begins_trial(self, epoch: int) -> bool:
        """Whether this is the first epoch of a training of a task."""
        return self.within_task(epoch) == 0

    def ends_trial(self, epoch: int) -> bool:
        """Whether this is the last epoch of a training of a task."""
        return self.within_task(epoch + 1) == 0

    def ends_task(self, epoch: int) -> bool:
        """Whether this is the last epoch of its tasks."""
        return (epoch + 1) % self.epochs_of_task == 0

    def is_last_trial(self, epoch: int) -> bool:
        """Whether this is an epoch of the last training of its tasks."""
        return epoch % self.epochs_of_task >= self.epochs_of_task - self.epochs_per_task

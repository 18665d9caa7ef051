"""Streams over several data sets: different tasks one after another, or the same classes in several domains."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from supsup_lightning.data.naming import TaskDescription, name_of_source
from supsup_lightning.data.sources import Named, Reading, Source
from supsup_lightning.data.streams import Stream, Task, Whole
from supsup_lightning.errors import ConfigurationError, check_whole
from supsup_lightning.seeding import derive_seed


class Mixed(Stream):
    """Streams one after another: tasks of different data sets, sizes and numbers of classes in one run.

    Args:
        streams: the streams; one without an end needs a number of tasks.
        num_tasks: number of tasks to take from each stream; None takes all.
    """

    def __init__(self, streams: Sequence[Stream], *, num_tasks: Sequence[int | None] | None = None) -> None:
        self.streams = list(streams)
        self.limits = (
            [None] * len(self.streams)
            if num_tasks is None
            else [None if limit is None else check_whole("data.stream.num_tasks", limit) for limit in num_tasks]
        )
        if not self.streams or len(self.limits) != len(self.streams):
            raise ConfigurationError(
                f"data.stream: {len(self.streams)} streams are mixed, with {len(self.limits)} numbers of tasks."
            )
        self.keeps_neighbours = all(stream.keeps_neighbours for stream in self.streams)
        self._starts: list[int] = []

    @property
    def sources(self) -> Sequence[Source]:
        """The data sets of all streams."""
        return [source for stream in self.streams for source in stream.sources]

    def length(self, root: Path) -> int | None:
        """Number of tasks in all streams."""
        lengths = []
        for place, (stream, limit) in enumerate(zip(self.streams, self.limits, strict=True)):
            length = stream.length(root)
            if length is None and limit is None:
                raise ConfigurationError(
                    f"data.stream.streams[{place}] ({type(stream).__name__}) has no end; say how many of its tasks to "
                    "take in data.stream.num_tasks."
                )
            if length is not None and limit is not None and limit > length:
                raise ConfigurationError(
                    f"data.stream.num_tasks: {limit} tasks are wanted of {type(stream).__name__}, which has {length}."
                )
            lengths.append(limit if limit is not None else length or 0)
        self._starts = [0, *accumulate(lengths)]
        return self._starts[-1]

    def load(self, root: Path, reading: Reading) -> None:
        """Read the data sets of all streams."""
        if not self._starts:
            self.length(root)
        for stream in self.streams:
            stream.load(root, reading)

    def identity(self) -> dict[str, Any]:
        """Return the data sets and options of all streams."""
        return {**super().identity(), "streams": [stream.identity() for stream in self.streams]}

    def task(self, task: int, *, seed: int) -> Task:
        """Return the data of a task, taken from the stream that it falls into."""
        place, number = self._find(task)
        return self.streams[place].task(number, seed=derive_seed(seed, "mixed", place))

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name a task as the stream does that it falls into."""
        place, number = self._find(task)
        stream = self.streams[place]
        found = stream.describe(number, root=root, seed=derive_seed(seed, "mixed", place))
        if isinstance(stream, Whole):
            return found
        return found._replace(name=f"{', '.join(map(name_of_source, stream.sources))}: {found.name}")

    def _find(self, task: int) -> tuple[int, int]:
        """Position of a task's stream, and the task's number in it."""
        for place, (start, end) in enumerate(pairwise(self._starts)):
            if start <= task < end:
                return place, task - start
        raise ConfigurationError(f"Task {task} is not among the {self._starts[-1]} of the mixed streams.")


class Domains(Mixed):
    """One set of classes in several domains: each data set is a task.

    Args:
        sources: one data set per domain, all with the same classes.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__([Whole(source) for source in sources])

    def length(self, root: Path) -> int | None:
        """Number of domains, with one task each. Raises `ConfigurationError` if their classes differ."""
        numbers = [source.num_classes(root) for source in self.sources]
        names = [source.class_names(root) for source in self.sources if isinstance(source, Named)]
        different = next((other for other in names if other != names[0]), None)
        if len(set(numbers)) > 1 or different is not None:
            shown = numbers if different is None else f"{names[0]} and {different}"
            raise ConfigurationError(
                f"The domains of data.stream.sources have different classes: {shown}. Domains share their classes, by "
                "name; use supsup_lightning.data.Mixed for data sets that do not."
            )
        return super().length(root)

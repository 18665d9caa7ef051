"""Shards: parts of a sequence of tasks, each trained by a run of its own."""

import re
from dataclasses import dataclass
from typing import Any

from supsup_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Shard:
    """One of ``count`` shards; ``number`` counts from 0."""

    number: int
    count: int

    @classmethod
    def of(cls, text: Any) -> "Shard":
        """Read ``i/n``. Raises `ConfigurationError` for anything else.

        >>> Shard.of("0/4")
        Shard(number=0, count=4)
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text) if isinstance(text, str) else None
        if found is None or int(found[1]) >= int(found[2]):
            raise ConfigurationError(
                f"data.task_shard={text!r} must be i/n, with i from 0 to n - 1: 0/4 is the first of four shards."
            )
        return cls(int(found[1]), int(found[2]))

    def tasks(self, num_tasks: int, *, tasks_at_once: int = 1) -> range:
        """Return the numbers of this shard's tasks: a contiguous block of whole groups of ``tasks_at_once``.

        Blocks differ by one group at most. A shard trains its tasks in the same groups as one run over all of them.

        Raises:
            ConfigurationError: there are more shards than groups, so that one would be empty.

        >>> [Shard(number, 4).tasks(10) for number in range(4)]
        [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
        >>> [Shard(number, 2).tasks(10, tasks_at_once=4) for number in range(2)]
        [range(0, 4), range(4, 10)]
        """
        groups = -(-num_tasks // tasks_at_once)
        if self.count > groups:
            of = f"{groups} groups of data.tasks_at_once={tasks_at_once}" if tasks_at_once > 1 else f"{groups} tasks"
            raise ConfigurationError(
                f"data.task_shard={self.number}/{self.count} divides {of} into more parts than there are; use at most "
                f"{groups} shards."
            )
        first, end = (number * groups // self.count * tasks_at_once for number in (self.number, self.number + 1))
        return range(first, min(end, num_tasks))

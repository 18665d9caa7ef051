"""Cores of this machine, and their share for each of several jobs at once."""

import os


def cores() -> int:
    """Number of cores that this process may use.

    >>> cores() >= 1
    True
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def threads_per_job(num_jobs: int) -> int:
    """Return the number of threads for each of ``num_jobs`` jobs at once; -1 stands for one job per core.

    >>> threads_per_job(10**6), threads_per_job(1) == cores(), threads_per_job(-1)
    (1, True, 1)
    """
    return max(1, cores() // (num_jobs if num_jobs > 0 else cores()))

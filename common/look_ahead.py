"""The one way to work ahead: an ordered map whose results are made in threads before they are asked for."""

import collections
import os
from concurrent.futures import ThreadPoolExecutor


def ordered_map(function, items, ahead=1, threads=1, finish=False):
    """Yield function(item) for each item, in order; at most `ahead` results are under way or wait beyond the current.

    items is read in the consumer's thread and may be endless. An error of `function` is raised where its result is due.
    Leaving the loop, also by an error, waits for calls that have begun and, with `finish`, makes those that wait.
    """
    pending = collections.deque()
    with ThreadPoolExecutor(threads) as executor:
        try:
            for item in items:
                pending.append(executor.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            while pending and not finish:
                pending.popleft().cancel()


def cores_of_process():
    """Number of CPU cores for this process: its share if a launch runs several processes on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

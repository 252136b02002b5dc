"""The one way to work ahead: an ordered map whose results are made in threads before they are asked for."""

import collections
from concurrent.futures import ThreadPoolExecutor


def ordered_map(function, items, ahead=1, threads=1, pool=None):
    """Yield function(item) for each item, in order; at most `ahead` results are under way or wait beyond the current.

    items is read in the consumer's thread and may be endless. An error of `function` is raised where its result is due.
    Leaving the loop waits for calls that have begun. pool: an executor of the caller's, threads or processes, instead
    of `threads` new threads.
    """
    own = ThreadPoolExecutor(threads) if pool is None else None
    pending = collections.deque()
    try:
        for item in items:
            pending.append((pool or own).submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        if own is not None:
            own.shutdown(wait=True)

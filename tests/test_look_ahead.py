"""The bounded look-ahead."""

import itertools
import threading
import time

import pytest

from common.look_ahead import ordered_map


def test_results_come_in_order_however_long_each_takes():
    def slow_first(item):
        time.sleep(0.02 * (3 - item % 4))
        return item * item

    assert list(ordered_map(slow_first, range(12), ahead=5, threads=4)) == [i * i for i in range(12)]


def test_no_more_than_ahead_are_begun():
    begun = []
    results = ordered_map(begun.append, itertools.count(), ahead=2, threads=8)
    next(results)
    results.close()
    assert len(begun) <= 3


def test_an_error_comes_at_its_item_and_the_thread_ends():
    def fails(item):
        if item == 2:
            raise ValueError(item)
        return item

    results, before = ordered_map(fails, range(9), ahead=3), threading.active_count()
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        next(results)
    assert threading.active_count() == before

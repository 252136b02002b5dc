"""Progress in a log file and on a terminal."""

import io

from common import progress
from common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def log_file(monkeypatch):
    """(what is written to stderr, [time of the clock])."""
    stream, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return stream, clock


def test_a_log_file_gets_a_line_per_interval_and_a_last_one(monkeypatch):
    stream, clock = log_file(monkeypatch)
    with Progress(total=100, initial=20, unit="image", desc="encode") as bar:
        for _ in range(8):
            clock[0] += progress.INTERVAL / 3
            bar.update(10)
            bar.refresh()  # as set_postfix does in every step
    lines = stream.getvalue().split("\n")
    assert [line.split(" image")[0] for line in lines] == [
        "encode: 50 of 100",
        "encode: 80 of 100",
        "encode: 100 of 100",
        "",
    ]
    assert "\r" not in stream.getvalue() and all("left" in line for line in lines[:-1])


def test_nothing_is_written_if_all_was_done_before_or_progress_is_disabled(monkeypatch):
    stream, _ = log_file(monkeypatch)
    for options in ({"initial": 3}, {"disable": True}):
        with Progress(total=3, **options) as bar:
            bar.update(0)
    assert list(Progress([1, 2], disable=True)) == [1, 2] and stream.getvalue() == ""


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    assert list(Progress(range(3), unit="batch")) == [0, 1, 2]
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue()

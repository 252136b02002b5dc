"""Progress of a command: a bar on a terminal, lines in a log file."""

import sys
import time

from tqdm import tqdm

INTERVAL = 30  # seconds between lines
LINE = "{desc}{n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm on a terminal. Elsewhere a line every INTERVAL seconds and at the end, without carriage returns."""

    def __init__(self, *iterable, desc=None, **options):
        self.is_bar, self.said = sys.stderr.isatty(), time.monotonic()
        options |= {"desc": f"{desc}: " if desc else None, "mininterval": 1, "smoothing": 0.05}
        super().__init__(*iterable, **options, **({} if self.is_bar else {"bar_format": LINE}))

    def display(self, msg=None, pos=None):
        if self.is_bar:
            return super().display(msg, pos)
        if time.monotonic() - self.said >= INTERVAL:
            self.write_line()

    def write_line(self):
        self.said = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def close(self):
        if not (self.is_bar or self.disable):
            if self.n > self.initial:
                self.write_line()
            self.disable = True  # there is no bar to clear
        super().close()

"""What only a GPU shows, in four phases that end within 8 minutes each.

    python -m benchmarks.gpu_session --phase 1                  # one of 1 to 4; default: all
    python -m benchmarks.gpu_session --phase 2 --out phase2.jsonl
    python -m benchmarks.gpu_session --tiny                     # tries the program, on a CPU too; compiles nothing

1: versions, GPU tests, rates of copies and matrix products, attention kernels. 2: steps of DeepFlow-XL/2, eager and
compiled, its top kernels. 3: DeepFlow-B/2, whole graph, data parallelism, flow maps. 4: sampling, decoding, programs.

Every row is appended to --out as JSON once it is measured, and the table is printed at the end. An item that runs out
of memory or time, lacks a package or fails leaves a row that says so. Predictions: one H200, compiled bf16.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks import gpu_items
from benchmarks.timing import ON_GPU, describe_machine, free, print_table
from common.errors import InputError, exit_on_input_error, first_line
from common.flags import flag, parse_flags
from common.precision import set_math

SECONDS = 8 * 60 - 15  # per phase; what is still running then is interrupted
PHASES = {
    1: (gpu_items.versions, gpu_items.gpu_tests, gpu_items.rates, gpu_items.attention_kernels),
    2: (gpu_items.eager_steps, gpu_items.compiled_steps, gpu_items.top_kernels),
    3: (gpu_items.small_steps, gpu_items.whole_graph, gpu_items.data_parallel, gpu_items.flow_map_parts),
    4: (gpu_items.sampling_rates, gpu_items.decoding, gpu_items.programs),
}


@dataclasses.dataclass(kw_only=True)
class SessionFlags:
    """Flags of this program."""

    phase: tuple = flag(tuple(PHASES), "phases to run", int, nargs="+", choices=PHASES, group="precision and speed")
    tiny: bool = flag(False, "tiny networks, nothing compiled: to try the program", group="model")
    out: str = flag("gpu_session.jsonl", "rows are appended here", group="output")

    def check(self):
        """Raise InputError on a machine without GPU."""
        if not (ON_GPU or self.tiny):
            raise InputError("--tiny is missing: this machine has no GPU, and the networks are too large for its CPU")


class Session:
    """Runs items and keeps a row for everything that they measure."""

    def __init__(self, out, sizes):
        self.out, self.sizes, self.rows = Path(out), sizes, []

    def run_phase(self, phase):
        end = time.monotonic() + SECONDS
        for item in PHASES[phase]:
            self.run(phase, item, end - time.monotonic())

    def run(self, phase, item, seconds):
        """Run one item; if it ends early, its last row gives the reason."""
        name = item.__name__.replace("_", " ")
        try:
            with time_limit(seconds):
                for measured in item(self.sizes):
                    self.add(phase, name, measured)
            return
        except torch.OutOfMemoryError:
            fault = "out of memory"
        except TimeoutError:
            fault = "out of time"
        except ModuleNotFoundError as error:
            fault = f"{error.name} is not installed"
        except Exception as error:  # one failure must not cost the other rows
            fault = f"failed: {type(error).__name__}: {first_line(error)}"
        finally:
            free()
        self.add(phase, name, gpu_items.Measured("–", fault))

    def add(self, phase, item, measured):
        """Append a row to the file and print it on stderr."""
        ratio = measured.ratio()
        row = {"phase": phase, "item": item, **dataclasses.asdict(measured), "ratio": ratio}
        with open(self.out, "a") as file:
            file.write(json.dumps({**row, "machine": describe_machine(), "time": time.strftime("%F %T")}) + "\n")
        cells = [row["predicted"], row["value"], ratio]
        cells = ["–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells]
        self.rows.append([phase, item, measured.what, measured.unit, *cells])
        print(*self.rows[-1], sep=" | ", file=sys.stderr, flush=True)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError if the context takes longer than `seconds`."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(args):
    """Run the phases that the flags name; returns the Session."""
    args.check()
    set_math(allow_tf32=True)
    session = Session(args.out, gpu_items.TINY if args.tiny else gpu_items.FULL)
    stance = "force_eager" if args.tiny else "default"
    with torch.compiler.set_stance(stance):
        for phase in args.phase:
            session.run_phase(phase)
    print_table(["phase", "item", "what", "unit", "predicted", "measured", "ratio"], session.rows)
    return session


if __name__ == "__main__":
    with exit_on_input_error():
        run(parse_flags(SessionFlags, description=__doc__))

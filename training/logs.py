"""Reports of a training run: a JSONL log, a progress bar, warnings about loss spikes, and the list of its starts."""

import collections
import contextlib
import dataclasses
import datetime
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import InputError
from common.files import read_bytes, write_atomically
from common.records import Whole, parse_record, read_record_lines
from common.versions import versions
from models.flops import peak_flops


@dataclasses.dataclass
class Start:
    """The fields of a line of starts.jsonl that are read."""

    step: Whole


def add_start(run_dir, step, changes):
    """Add a line to starts.jsonl: step, time, host, versions and changed flags. It is kept when the run is rewound."""
    path, now = Path(run_dir) / "starts.jsonl", datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    start = {"step": step, "time": now, "host": platform.node(), "versions": versions("torch", "accelerate")}
    before = read_bytes(path, "move it away") if path.exists() else b""
    line = json.dumps({**start, "changes": changes}) + "\n"
    write_atomically(path, lambda file: file.write(before + line.encode()))


def resumed_steps(run_dir):
    """Steps at which a run was resumed; [] for runs from before starts were recorded. Raises InputError."""
    path = Path(run_dir) / "starts.jsonl"
    starts = read_record_lines(Start, path) if path.exists() else []
    return [start.step for _, start in starts if start.step]


def parse_line(line, where):
    """{name: number} of a line of log.jsonl, `step` among them; `where` names it in messages. Raises InputError."""
    record = parse_record(dict[str, float | dict], line, where, "pass the log.jsonl of a run")  # dict: older `changes`
    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
    if "step" not in numbers:
        raise InputError(f"{where}: 'step' is missing; pass the log.jsonl of a run")
    return numbers


class RunLog:
    """Collects values on the device, writes their means every `--log-every` steps on the main process.

    flops_per_image: of one training step, forward and backward; None leaves MFU out. send: as in `tracking`.
    """

    SPIKE = 3.0  # times the running median of the loss

    def __init__(self, accelerator, run_dir, config, start_step, total_steps, flops_per_image=None, send=None):
        self.accelerator, self.config, self.path, self.send = accelerator, config, Path(run_dir) / "log.jsonl", send
        peak = peak_flops(accelerator.device, config.mixed_precision)
        self.mfu_per_rate = flops_per_image / (peak * accelerator.num_processes) if flops_per_image and peak else None
        self.names, self.sums, self.count, self.steps = [], 0, 0, 0
        self.recent = collections.deque(maxlen=50)
        self.since = time.perf_counter()
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
        quiet = None if accelerator.is_main_process else True  # None: only a terminal has a bar
        bar = {"bar_format": form, "smoothing": 0.05, "mininterval": 1, "disable": quiet}
        self.bar, self.total = tqdm(initial=start_step, total=total_steps, **bar), total_steps
        if accelerator.is_main_process:
            self._forget_after(start_step)

    def _forget_after(self, step):
        """Drop lines of steps that are about to be repeated, and a half-written last line."""
        kept, before = [], read_bytes(self.path, "move it away") if self.path.exists() else b""
        for line in before.decode(errors="replace").splitlines():
            with contextlib.suppress(InputError):
                if parse_line(line, self.path)["step"] <= step:
                    kept.append(line + "\n")
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))

    def add(self, values, bad):
        """Add values of one step: name → 0-d tensor; a bad step (0-d bool) enters no mean. Waits for no device."""
        self.names = list(values)
        vector = torch.stack([value.float() for value in values.values()])
        self.sums = self.sums + torch.where(bad, 0, vector)
        self.count = self.count + ~bad
        self.steps += 1
        self.bar.update()

    def write(self, step, epoch, **extra):
        """Average over the steps and processes since the last line; one line of JSON, the bar, the tracker."""
        *sums, count = self.accelerator.reduce(torch.cat([self.sums, self.count[None]]), reduction="mean").tolist()
        means = {name: total / count for name, total in zip(self.names, sums, strict=True)} if count else {}
        record = {"step": step, "epoch": round(epoch, 4), **means, **extra, **self._speed()}
        self.sums, self.count, self.steps = 0, 0, 0
        loss = f"loss {record['loss']:.4f}, " if means else ""
        speed = f"{loss}{record['images_per_s']:,.0f} images/s"
        self.bar.set_postfix_str(speed)
        if self.bar.disable:
            left = tqdm.format_interval((self.total - step) / max(record["steps_per_s"], 1e-4))
            self.say(f"step {step:,} of {self.total:,}: {speed}, {left} left")
        if means:
            self._warn_of_spike(record, step)
        self.record(record)

    def record(self, record):
        """Write a line of JSON, {name: number} with `step`, and send it to the tracker; on the main process."""
        if self.accelerator.is_main_process:
            with self.reporting_disk_errors(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            if self.send:
                with self.reporting_disk_errors(self.config.logging_dir):
                    self.send({name: value for name, value in record.items() if name != "step"}, record["step"])

    def _speed(self):
        """Steps and images per second since the last line, MFU where the GPU's peak is known, memory (this process)."""
        before, self.since = self.since, time.perf_counter()
        rate = self.steps / (self.since - before)
        images = rate * self.config.batch_size
        mfu = {"mfu": round(images * self.mfu_per_rate, 4)} if self.mfu_per_rate else {}
        memory = round(peak_memory(self.accelerator.device) / 2**30, 3)
        return {"steps_per_s": round(rate, 4), "images_per_s": round(images, 2), **mfu, "memory_gib": memory}

    @contextlib.contextmanager
    def reporting_disk_errors(self, path, fatal=False):
        """Report an OSError, for example a full disk, and go on; fatal: raise InputError instead."""
        try:
            yield
        except OSError as error:
            fault = f"{path} is not written ({error.strerror or error})"
            if fatal:
                remedy = "earlier checkpoints are kept; free space and continue with --resume latest"
                raise InputError(f"{fault}; {remedy}") from None
            self.say(f"warning: {fault}; free space, training continues")

    @contextlib.contextmanager
    def paused(self):
        """Time spent in this context does not count as training time."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def _warn_of_spike(self, record, step):
        name = "error_map" if "error_map" in record else "loss_v1"  # always positive; the total loss often is not
        if len(self.recent) >= 10 and record[name] > self.SPIKE * (median := statistics.median(self.recent)):
            self.say(f"warning: at step {step}, {name} is {record[name]:.4f}; its running median is {median:.4f}")
        self.recent.append(record[name])

    def say(self, text):
        """Print a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            with tqdm.external_write_mode():
                print(text, flush=True)


def peak_memory(device):
    """Largest memory in bytes so far: allocated on a GPU, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

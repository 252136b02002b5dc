"""What a run says while it goes: a JSONL log that is always written, trackers, a progress bar, warnings of spikes."""

import collections
import contextlib
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from training.checkpoint import write_atomically


class RunLog:
    """Collects values on the device, writes their means every `interval` steps on the main process."""

    SPIKE = 3.0  # times the running median of the loss

    def __init__(self, accelerator, run_dir, config, start_step, total_steps):
        self.accelerator, self.config = accelerator, config
        self.path = Path(run_dir) / "log.jsonl"
        self.sums, self.count, self.steps = collections.defaultdict(float), 0, 0
        self.recent = collections.deque(maxlen=50)
        self.since = time.perf_counter()
        self.bar = tqdm(
            initial=start_step,
            total=total_steps,
            unit="step",
            disable=not accelerator.is_main_process,
            smoothing=0.05,
            mininterval=1,
        )
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._forget_after(start_step)

    def _forget_after(self, step):
        """Drop lines of steps that are about to be repeated, and a half-written last line."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))

    def add(self, values):
        """Values of one step: name → 0-d tensor or number; none for a skipped step, which no mean counts."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value
        self.count += bool(values)
        self.steps += 1
        self.bar.update()

    def write(self, step, epoch, **extra):
        """Average over the steps and processes since the last line; one line of JSON, the bar, the tracker."""
        means = self._means()
        now = time.perf_counter()
        rate = self.steps / (now - self.since)
        self.since, self.count, self.steps = now, 0, 0
        self.sums.clear()
        record = {"step": step, "epoch": round(epoch, 4), **means, **extra}
        record.update(steps_per_s=round(rate, 4), samples_per_s=round(rate * self.config.batch_size, 2))
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            if means:
                self.bar.set_postfix(loss=f"{record['loss']:.4f}", grad=f"{record['grad_norm']:.2f}")
                self._warn_of_spike(record["loss"], step)
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)

    @contextlib.contextmanager
    def paused(self):
        """What happens within does not count as training time."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def _means(self):
        """{name: mean} over the processes and the steps that were not skipped; empty when all were."""
        names = sorted(self.sums)
        if not names:
            return {}
        local = torch.stack([torch.as_tensor(self.sums[n], device=self.accelerator.device).float() for n in names])
        means = self.accelerator.reduce(local, reduction="mean") / self.count
        return dict(zip(names, means.tolist(), strict=True))

    def _warn_of_spike(self, loss, step):
        median = statistics.median(self.recent) if len(self.recent) >= 10 else float("inf")
        if loss > self.SPIKE * median:
            self.say(f"warning: at step {step} the loss is {loss:.4f}, its running median {median:.4f}")
        self.recent.append(loss)

    def say(self, text):
        """Print a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def close(self):
        self.bar.close()

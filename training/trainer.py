"""The training loop that every train_*.py runs: batches and draws in, one optimizer step, EMA, log, checkpoint."""

import contextlib
import dataclasses
from pathlib import Path

import torch

from common.errors import InputError
from common.files import write_json
from common.flags import shown
from common.look_ahead import ordered_map
from training.checkpoint import (
    checkpoint_path,
    existing_steps,
    find_resume,
    lock_run,
    remove_leftovers,
    restore,
    roll,
    save_checkpoint,
    set_aside_after,
)
from training.distributed import rows_of_rank
from training.ema import EMA
from training.guard import BadSteps, all_finite
from training.loader import LatentLoader, SeekableSampler
from training.logs import RunLog
from training.stop import StopRequest


class Trainer:
    """Owns model, EMA, optimizer, data order and log of a run.

    objective(network, batch, draws) → (loss, {name: 0-d tensor}); draw(step) → the draws of a whole batch;
    saved: entries for the checkpoint and config.json (`config`, `data`); flops_per_image: of one training step, for
    the log's MFU.
    """

    def __init__(
        self,
        accelerator,
        config,
        run_dir,
        model,
        dataset,
        objective,
        draw,
        saved,
        on_sample=None,
        flops_per_image=None,
    ):
        self.accelerator, self.config, self.run_dir = accelerator, config, Path(run_dir)
        self.dataset, self.objective, self.saved, self.on_sample = dataset, objective, saved, on_sample
        self.draw, self.flops_per_image = draw, flops_per_image
        accumulation = config.gradient_accumulation_steps
        self.rows = rows_of_rank(config.batch_size, accelerator.num_processes, accumulation, accelerator.process_index)
        self.sampler = SeekableSampler(len(dataset), config.batch_size, config.seed)
        self.stop_step = min(config.max_train_steps, config.epochs * self.sampler.steps_per_epoch)
        self.model = model.to(accelerator.device)
        self.ema = EMA(self.model, config.ema_decay)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        self.network, self.optimizer = accelerator.prepare(self.model, optimizer)
        if config.compile:  # in place: no name in a checkpoint changes
            self.model.compile(fullgraph=True)
        self.bad_steps = BadSteps(accelerator.device)

    def resume(self):
        """Restore the state of --resume; returns the step to go on from."""
        step, path = 0, find_resume(self.run_dir, self.config.resume)
        if path:
            content = restore(path, self.model, self.ema, self.optimizer, self.accelerator.scaler, **self.saved)
            step = content["steps"]
            self.bad_steps.load_state_dict(content["train_state"])
            changed = changed_flags(content["config"], self.saved["config"])
            self.accelerator.print(f"resumed from {path}" + "".join(f"; {change}" for change in changed))
        seen = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).unique().tolist()
        if len(seen) > 1:
            raise InputError(
                f"the processes find different checkpoints in {self.run_dir} (steps {seen}); --output-dir must be on "
                "a file system that all nodes share"
            )
        if step >= self.stop_step:
            self.accelerator.print(f"{self.run_dir} is complete at step {step}; raise --max-train-steps to go on")
        return step

    def fit(self):
        """Train from --resume to the last step; returns whether it got there, which a signal may prevent."""
        main = self.accelerator.is_main_process
        with (
            lock_run(self.run_dir) if main else contextlib.nullcontext(),
            StopRequest(self.accelerator.num_processes) as stop,
        ):
            step = self.resume()
            if step >= self.stop_step:
                return True
            if main:
                self.begin(step)
            return self.loop(step, stop)

    def begin(self, step):
        """Put the run's folder in order before it goes on from a step."""
        remove_leftovers(self.run_dir)
        if later := set_aside_after(self.run_dir, step):
            print(f"checkpoints of later steps {later} are set aside as .pt.abandoned", flush=True)
        write_json(self.run_dir / "config.json", self.saved["config"])

    def loop(self, step, stop):
        """All steps from `step` on, until the last or a stop; returns whether the last was reached."""
        device, end = self.accelerator.device, self.stop_step
        self.log = RunLog(self.accelerator, self.run_dir, self.config, step, end, self.flops_per_image)
        batches = LatentLoader(self.dataset, self.sampler, self.rows.numpy(), step, end, device)
        try:
            for batch, draws in zip(batches, ordered_map(self.draw, range(step, end)), strict=True):
                self.log.add(*self.train_step(batch, draws.rows(self.rows, device)))
                step, stopping = batch.step + 1, stop.agreed()
                self.after_step(step, stopping)
                if stopping and step < end:
                    self.log.say(f"stopped by a signal after step {step}; the same command with --resume auto goes on")
                    return False
            return True
        finally:
            self.log.close()

    def train_step(self, batch, draws):
        """One optimizer step over this rank's rows, micro-batch by micro-batch; returns values to log and whether bad.

        Bad is a 0-d bool on the device, for which nothing waits: loss or gradients are not finite. A loss that is not
        makes all gradients NaN, and gradients are averaged over the processes, so all of them decide alike.
        """
        accumulation, values = self.config.gradient_accumulation_steps, {}
        size = len(self.rows) // accumulation
        for start in range(0, len(self.rows), size):
            rows = slice(start, start + size)
            with self.accelerator.accumulate(self.network):
                loss, parts = self.objective(self.network, batch.part(rows), draws.part(rows))
                self.accelerator.backward(loss * (0 * loss.detach() + 1))  # times 1, or times NaN
            for name, value in {"loss": loss.detach(), **parts}.items():
                values[name] = values.get(name, 0) + value / accumulation
        values["grad_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        bad = ~torch.isfinite(values["grad_norm"])
        self.update(bad)
        return values, bad

    def update(self, bad):
        """Optimizer and EMA step; where `bad` holds, both keep their state to the bit. Waits for no device.

        The optimizer is called without accelerate's wrapper, which would wait to see whether the fp16 scaler skipped.
        """
        optimizer, scaler = self.optimizer.optimizer, self.accelerator.scaler
        optimizer.found_inf = bad.float()  # fused AdamW then changes nothing
        optimizer.step()
        optimizer.zero_grad()
        if scaler is not None:
            scaler.update()  # it saw the gradients when clipping unscaled them
        self.ema.update(self.model, skip=bad)
        self.bad_steps.count(bad)

    def after_step(self, step, stopping):
        """Log, checkpoint and sample at their intervals; a checkpoint is always written at the end."""
        config, last = self.config, step == self.stop_step
        if step % config.log_every == 0 or last or stopping:
            bad_steps, in_a_row = self.bad_steps.read()
            epoch = step / self.sampler.steps_per_epoch
            self.log.write(step, epoch, learning_rate=config.learning_rate, bad_steps=bad_steps)
            self.check_bad_steps(step, bad_steps, in_a_row)
        stays = step % config.checkpointing_steps == 0 or last
        with self.log.paused():
            if stays or stopping or (config.rolling_steps and step % config.rolling_steps == 0):
                self.save(step, stays)
            if config.sampling_steps and (last or (step % config.sampling_steps == 0 and not stopping)):
                self.sample(step)

    def check_bad_steps(self, step, bad_steps, in_a_row):
        """Say so when there were more bad steps since the last look. Raises InputError when too many in a row."""
        if in_a_row >= self.config.max_bad_steps:
            raise InputError(
                f"the loss or its gradients were not finite for {in_a_row} steps in a row, up to step {step}; "
                f"{self.last_checkpoint()}; resume from one with a lower --learning-rate or another --mixed-precision"
            )
        if bad_steps > self.bad_steps.seen:
            more = bad_steps - self.bad_steps.seen
            self.log.say(f"warning: skipped, as loss or gradients were not finite: {more} of the steps up to {step}")
        self.bad_steps.seen = bad_steps

    def last_checkpoint(self):
        """In words; every checkpoint is good, as no bad step changes anything and no other weights are written."""
        steps = existing_steps(self.run_dir)
        return (
            f"the last good checkpoint is {checkpoint_path(self.run_dir, steps[-1])}" if steps else "no checkpoint yet"
        )

    def sample(self, step):
        """Draw a grid with the averaged weights on the main process, the only one that has `on_sample`; all wait."""
        if self.accelerator.is_main_process:
            with self.ema.swapped_into(self.model), self.log.surviving_disk_errors(self.run_dir / "samples"):
                self.log.say(f"sample grid: {self.on_sample(self.model, step)}")
        self.accelerator.wait_for_everyone()

    def save(self, step, stays):
        """Write the checkpoint of a step on the main process; one that does not stay makes way for later ones."""
        if not all_finite([*self.model.parameters(), *self.ema.shadow.values()]):
            raise InputError(
                f"the weights at step {step} are not finite and are not saved; {self.last_checkpoint()}; "
                "resume from one with a lower --learning-rate"
            )
        if self.accelerator.is_main_process:
            path = checkpoint_path(self.run_dir, step)
            with self.log.surviving_disk_errors(path) if not stays else ending_on_disk_errors(path):
                save_checkpoint(path, **self.state(step))
                self.log.say(f"checkpoint: {path}")
                roll(self.run_dir, step, stays, self.config.keep_last)
        self.accelerator.wait_for_everyone()

    def state(self, step):
        """Content of the checkpoint of a step."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "steps": step,
            "train_state": {**self.bad_steps.state_dict(), "samples_seen": step * self.config.batch_size},
            **self.saved,
        }


@contextlib.contextmanager
def ending_on_disk_errors(path):
    """A checkpoint that was to stay, and cannot be written, ends the run with one line. Raises InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} is not written ({error.strerror or error}); the checkpoints before it stay; free space and go on "
            "with --resume latest"
        ) from None


def changed_flags(before, now):
    """What is trained otherwise than before a resume, in words; a change of what bears on no number is left out."""
    silent = {"data_dir", "output_dir", "exp_name", "logging_dir", "report_to", "num_workers", "resume", "vae"}
    silent |= {"log_every", "keep_last"} | {name for name in now if name.endswith("_steps")} | {"model_options"}
    names = [name for name in now if name not in silent and before.get(name) != now[name]]
    return [f"{shown(name)} was {before.get(name)}, is {now[name]}" for name in names]


def describe_data(dataset):
    """What a checkpoint records of its data, JSON-like: classes, VAE, shapes."""
    info = dataclasses.asdict(dataset.info)
    spec = info.pop("spec")
    info["moments_shape"] = list(info["moments_shape"])
    info["class_names"] = list(info["class_names"]) if info["class_names"] else None
    return {**info, **spec}

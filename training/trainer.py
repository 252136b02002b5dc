"""The training loop of every train*.py: batches and draws in, one optimizer step, EMA, log, checkpoints, grids."""

import contextlib
import math

import torch

from common.errors import InputError
from common.files import locked, write_json
from common.look_ahead import ordered_map
from models.compiling import compile_blocks
from training import checkpoint
from training.ema import EMA
from training.holdout import HeldOut, in_short
from training.loader import LatentLoader
from training.logs import RunLog, add_start
from training.settings import in_words, resumed_settings
from training.stop import StopRequest
from training.trackers import tracking


class Trainer:
    """Model, EMA, optimizer, data order and log of a run, and its loop: `fit`."""

    def __init__(self, run, objective, draw, on_sample):
        """objective(network, batch, draws), draw(step): as in Task; on_sample(model, step) → path of a grid."""
        self.run, self.config, self.accelerator, self.saved = run, run.config, run.accelerator, run.saved()
        self.objective, self.draw, self.on_sample = objective, draw, on_sample
        self.changes, self.writer = {}, None  # changes: of settings when resuming
        self.run_dir, self.stop_step = run.config.folder, run.stop_step
        self.model = run.model.to(self.accelerator.device)
        self.network, self.optimizer = self.accelerator.prepare(self.model, make_optimizer(run.config, self.model))
        self.ema = EMA(self.model, run.config.ema_decay)  # all processes now have the first one's weights
        self.network.broadcast_buffers = False  # they are constants; DDP's argument of this name is deprecated
        if run.config.compile:
            compile_blocks(self.model)
        self.bad_steps = BadSteps(self.accelerator.device)
        self.held_out = HeldOut(run, objective) if run.held else None

    def fit(self):
        """Train from --resume to the last step; returns whether it got there, which a signal may prevent."""
        main = self.accelerator.is_main_process
        stopping = StopRequest(self.accelerator.num_processes, self.finish_writing)
        with locked(self.run_dir, "--exp-name", main), stopping as stop:
            step = self.resume()
            if step >= self.stop_step:
                return True
            with tracking(self.config, step) if main else contextlib.nullcontext() as send:
                if main:
                    checkpoint.clear_way(self.run_dir, step)
                    write_json(self.run_dir / "config.json", self.saved["config"])
                    add_start(self.run_dir, step, self.changes)
                step = self.loop(step, stop, send)
            self.accelerator.wait_for_everyone()  # a launcher may kill the writing process once another has ended
        if step < self.stop_step:
            self.accelerator.print(f"stopped by a signal after step {step}; --resume auto continues the run")
        return step == self.stop_step

    def resume(self):
        """Restore the state of --resume; returns the step to continue from."""
        step, path = 0, checkpoint.find_resume(self.run_dir, self.config.resume)
        if path:
            found = checkpoint.read(path, self.run.info)
            self.adopt(found, path)
            checkpoint.restore(found, path, self.model, self.ema, self.optimizer, self.accelerator.scaler)
            step = found.steps
            self.bad_steps.load_state_dict(vars(found.train_state))
        seen = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).unique().tolist()
        if len(seen) > 1:
            fault = f"the processes find different checkpoints in {self.run_dir} (steps {seen})"
            raise InputError(f"{fault}; --output-dir must be on a file system that all nodes share")
        if step >= self.stop_step:
            remedy = "raise --max-train-steps or --epochs to continue"
            self.accelerator.print(f"{self.run_dir} is complete at step {step}; {remedy}")
        elif path:
            changed = f"; changed from here on: {in_words(self.changes)}" if self.changes else ""
            self.accelerator.print(f"resumed from {path}{changed}")
        return step

    def adopt(self, found, path):
        """Record what a resumed run keeps of the Checkpoint's settings, and what it changes. Raises InputError."""
        self.run.config, self.changes = resumed_settings(self.run, found, path)
        self.config, self.saved = self.run.config, self.run.saved()
        self.run.noise_block = found.train_state.noise_block
        record = [{"step": found.steps, "changes": self.changes}] if self.changes else []
        if record := [*found.config.get("changes", []), *record]:
            self.saved["config"]["changes"] = record

    def loop(self, step, stop, send):
        """Train from `step` to the last step or a stop; returns the number of steps done. send: as in `tracking`."""
        device, end = self.accelerator.device, self.stop_step
        batches = LatentLoader(self.run.dataset, self.run.sampler, self.run.rows.numpy(), step, end, device)
        log = RunLog(self.accelerator, self.run_dir, self.config, step, end, self.run.flops_per_image, send)
        writer = checkpoint.CheckpointWriter(self.run_dir, self.config.keep_last, log)
        self.log, self.writer = log, writer
        with log.bar, writer.pool:
            for batch, draws in zip(batches, ordered_map(self.draw, range(step, end)), strict=True):
                log.add(*self.train_step(batch, draws.to(device)))
                step, stopping = batch.step + 1, stop.agreed()
                self.after_step(step, stopping)
                if stopping:
                    break
            writer.check(wait=True)
        return step

    def train_step(self, batch, draws):
        """One optimizer step over this rank's rows, micro-batch by micro-batch; returns values to log and `bad`.

        bad: 0-d bool on the device, whether loss or gradients are not finite; nothing waits for it. A non-finite loss
        makes all gradients NaN, and gradients are averaged over the processes, so all of them agree.
        """
        accumulation, values = self.config.gradient_accumulation_steps, {}
        size = len(self.run.rows) // accumulation
        for start in range(0, size * accumulation, size):
            rows = slice(start, start + size)
            with self.accelerator.accumulate(self.network):
                loss, parts = self.objective(self.network, batch.part(rows), draws.part(rows))
                self.accelerator.backward(loss * (0 * loss.detach() + 1))  # times 1, or times NaN
            for name, value in {"loss": loss.detach(), **parts}.items():
                values[name] = values.get(name, 0) + value / accumulation
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        values["grad_norm"] = norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~torch.isfinite(norm)
        self.update(norm, bad)
        return values, bad

    def update(self, norm, bad):
        """Optimizer step with gradients clipped by their norm, and EMA step. Does not wait for the device.

        If `bad` is true, not a bit changes.

        accelerate's wrapper of the optimizer is bypassed: it would wait for the device to see whether the fp16 scaler
        skipped the step.
        """
        optimizer, scaler = self.optimizer.optimizer, self.accelerator.scaler
        excess = (norm + 1e-6) / self.config.max_grad_norm  # as in torch.nn.utils.clip_grad_norm_
        optimizer.grad_scale = excess.clamp(min=1)  # fused AdamW divides by it: clipping needs no extra pass
        optimizer.found_inf = bad.float()  # fused AdamW then changes nothing
        optimizer.step()
        optimizer.zero_grad()
        if scaler is not None:
            scaler.update()  # it checked the gradients when it unscaled them
        self.ema.update(self.model, skip=bad)
        self.bad_steps.count(bad)

    def after_step(self, step, stopping):
        """Log, checkpoint and sample at their intervals; a checkpoint is always written at the end."""
        config, last = self.config, step == self.stop_step
        self.writer.check()
        if step % config.log_every == 0 or last or stopping:
            bad, new, in_a_row = self.bad_steps.read()
            epoch = step / self.run.sampler.steps_per_epoch
            self.log.write(step, epoch, learning_rate=config.learning_rate, bad_steps=bad)
            if in_a_row >= config.max_bad_steps:
                fault = f"the loss or its gradients were not finite for {in_a_row} steps in a row, up to step {step}"
                raise self.diverged(fault)
            if new:
                self.log.say(f"warning: skipped, as loss or gradients were not finite: {new} of the steps up to {step}")
        stays = step % config.checkpointing_steps == 0 or last
        with self.log.paused():
            if self.held_out and (last or (step % self.held_out.every == 0 and not stopping)):
                self.measure(step)  # before the checkpoint: what is complete has its line
            if stays or stopping or (config.rolling_steps and step % config.rolling_steps == 0):
                self.save(step, stays)
            if config.sampling_steps and (last or (step % config.sampling_steps == 0 and not stopping)):
                self.sample(step)

    def measure(self, step):
        """Log the errors on the held-out images."""
        found = self.held_out.measure(self.model, self.ema)
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        self.log.record({"step": step, "epoch": round(step / self.run.sampler.steps_per_epoch, 4), **finite})
        warning = "" if len(finite) == len(found) else "; those that are not finite are left out"
        self.log.say(f"held-out errors at step {step:,}: {in_short(finite)}{warning}")

    def diverged(self, fault):
        """InputError naming the last checkpoint. It is good: bad steps change nothing, bad weights are not saved."""
        self.writer.check(wait=True)
        good = [checkpoint.checkpoint_path(self.run_dir, step) for step in checkpoint.existing_steps(self.run_dir)]
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint yet"
        remedy = "resume from one with a lower --learning-rate or another --mixed-precision"
        return InputError(f"{fault}; {last}; {remedy}")

    def sample(self, step):
        """Draw a grid with the averaged weights on the main process; the others wait for it in their next step."""
        if self.accelerator.is_main_process:
            with (
                torch.compiler.set_stance("force_eager"),  # compiling for its batch and precision would take longer
                self.ema.swapped_into(self.model),
                self.log.reporting_disk_errors(self.run_dir / "samples"),
            ):
                self.log.say(f"sample grid: {self.on_sample(self.model, step)}")

    def save(self, step, stays):
        """Write the checkpoint of a step on the main process, in a thread; unless it `stays`, later ones replace it."""
        if not torch.nn.utils.get_total_norm([*self.model.parameters(), *self.ema.shadow.values()]).isfinite():
            raise self.diverged(f"the weights at step {step} are not finite and are not saved")
        if self.accelerator.is_main_process:
            self.writer.save(step, stays, self.state(step))

    def finish_writing(self):
        """Wait for the checkpoint that is being written, if any."""
        if self.writer is not None:
            self.writer.check(wait=True)

    def state(self, step):
        """Content of the checkpoint of a step."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "steps": step,
            "train_state": {**self.bad_steps.state_dict(), "noise_block": self.run.noise_block},
            **self.saved,
        }


class BadSteps:
    """Counts steps with non-finite loss or gradients on the device: of the whole run, now in a row, most in a row."""

    def __init__(self, device):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.seen = 0  # total when last read

    def count(self, bad):
        """Note one step; bad: 0-d bool on the device."""
        total, in_a_row, longest = self.counts
        in_a_row = (in_a_row + 1) * bad
        self.counts = torch.stack([total + bad, in_a_row, torch.maximum(longest, in_a_row)])

    def read(self):
        """Counts (of the whole run, since the last read, most in a row); waits for the device."""
        total, _, longest = self.counts.tolist()
        new, self.seen = total - self.seen, total
        return total, new, longest

    def state_dict(self):
        total, in_a_row, _ = self.counts.tolist()
        return {"bad_steps": total, "bad_steps_in_a_row": in_a_row}

    def load_state_dict(self, state):
        self.seen, in_a_row = state["bad_steps"], state["bad_steps_in_a_row"]
        self.counts.copy_(torch.tensor([self.seen, in_a_row, 0]))  # longest series since this start


def make_optimizer(config, model):
    """AdamW over the parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    betas, decay, epsilon = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay, config.adam_epsilon
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=betas, eps=epsilon, weight_decay=decay, fused=True)

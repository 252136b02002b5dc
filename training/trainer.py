"""The training loop that every train_*.py runs: batches and draws in, one optimizer step, EMA, log, checkpoint."""

import dataclasses
from pathlib import Path

import torch

from dataset import LatentLoader, SeekableSampler
from models.errors import InputError
from training.checkpoint import (
    checkpoint_path,
    find_resume_step,
    remove_leftovers,
    restore,
    roll,
    save_checkpoint,
    set_aside_after,
    write_json,
)
from training.config import shown
from training.distributed import rows_of_rank
from training.draws import DrawAhead
from training.ema import EMA
from training.logs import RunLog

MAX_SKIPPED = 20  # consecutive steps without finite gradients; a fresh fp16 scaler needs a few to find its scale
ROLLING_KEPT = 2  # one from before a spike, one from after


class Trainer:
    """Owns model, EMA, optimizer, data order and log of a run.

    objective(network, batch, draws) → (loss, {name: 0-d tensor}); draw(step) → the draws of a whole batch;
    saved: entries for the checkpoint and config.json (`config`, `data`).
    """

    def __init__(self, accelerator, config, run_dir, model, dataset, objective, draw, saved, on_sample=None):
        self.accelerator, self.config, self.run_dir = accelerator, config, Path(run_dir)
        self.dataset, self.objective, self.saved, self.on_sample = dataset, objective, saved, on_sample
        self.draw = draw
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
            fused=accelerator.device.type in ("cuda", "cpu"),
        )
        self.network, self.optimizer = accelerator.prepare(self.model, optimizer)
        if config.compile:  # in place: no name in a checkpoint changes
            self.model.compile(fullgraph=True)
        self.skipped = self.skipped_in_a_row = 0

    def resume(self):
        """Restore the state of --resume-step; returns the step to go on from."""
        step = find_resume_step(self.run_dir, self.config.resume_step)
        seen = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).unique().tolist()
        if len(seen) > 1:
            raise InputError(
                f"the processes find different checkpoints in {self.run_dir} (steps {seen}); --output-dir must be on "
                "a file system that all nodes share"
            )
        if step:
            path = checkpoint_path(self.run_dir, step)
            content = restore(path, self.model, self.ema, self.optimizer, self.accelerator.scaler, **self.saved)
            self.skipped = content["train_state"]["skipped_steps"]
            changed = changed_flags(content["config"], self.saved["config"])
            self.accelerator.print(f"resumed from {path}" + "".join(f"; {change}" for change in changed))
        if step >= self.stop_step:
            self.accelerator.print(f"{self.run_dir} is complete at step {step}; raise --max-train-steps to go on")
        return step

    def fit(self):
        """Train from --resume-step to the last step."""
        step = self.resume()
        if step >= self.stop_step:
            return
        if self.accelerator.is_main_process:
            remove_leftovers(self.run_dir)
            if later := set_aside_after(self.run_dir, step):
                print(f"checkpoints of later steps {later} are set aside as .pt.abandoned", flush=True)
            write_json(self.run_dir / "config.json", self.saved["config"])
        self.log = RunLog(self.accelerator, self.run_dir, self.config, step, self.stop_step)
        draws = DrawAhead(self.draw)
        loader = LatentLoader(
            self.dataset, self.sampler, self.rows.numpy(), step, self.stop_step, self.accelerator.device
        )
        try:
            for batch in loader:
                self.log.add(self.train_step(batch, draws(batch.step).rows(self.rows, self.accelerator.device)))
                self.after_step(batch.step + 1)
        finally:
            draws.close()
            self.log.close()

    def train_step(self, batch, draws):
        """One optimizer step over this rank's rows, micro-batch by micro-batch.

        Returns the values to log: none where the step was skipped, or one infinity would be the mean of an interval.
        """
        accumulation = self.config.gradient_accumulation_steps
        values = {}
        for part in torch.arange(len(self.rows)).chunk(accumulation):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            with self.accelerator.accumulate(self.network):
                loss, parts = self.objective(self.network, batch.part(rows), draws.part(rows))
                self.accelerator.backward(loss)
            for name, value in {"loss": loss.detach(), **parts}.items():
                values[name] = values.get(name, 0) + value / accumulation
        values["grad_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        return values if self.update(values["grad_norm"], batch.step) else {}

    def update(self, grad_norm, step):
        """Optimizer and EMA step, unless the gradients are not finite: then neither is touched, and it is counted.

        The gradients are already summed over the processes, so all of them decide alike. Returns whether it stepped.
        """
        stepped = bool(torch.isfinite(grad_norm))
        if stepped or self.accelerator.scaler is not None:  # the fp16 scaler skips by itself, then lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        if stepped:
            self.ema.update(self.model)
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.log.say(f"warning: step {step + 1} skipped, its loss or gradients are not finite")
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise InputError(
                f"the loss or its gradients are not finite for {MAX_SKIPPED} steps in a row, up to step {step + 1}; "
                f"the checkpoints in {self.run_dir} are from before; resume from one with a lower --learning-rate or "
                "another --mixed-precision"
            )
        return False

    def after_step(self, step):
        """Log, checkpoint and sample at their intervals; a checkpoint is always written at the end."""
        config, last = self.config, step == self.stop_step
        if step % config.logging_steps == 0 or last:
            self.log.write(step, step / self.sampler.steps_per_epoch, skipped_steps=self.skipped)
        stays = step % config.checkpointing_steps == 0 or last
        with self.log.paused():
            if stays or (config.rolling_steps and step % config.rolling_steps == 0):
                self.save(step, stays)
            if config.sampling_steps and (step % config.sampling_steps == 0 or last):
                self.sample(step)

    def sample(self, step):
        """Draw a grid with the averaged weights on the main process, the only one that has `on_sample`; all wait."""
        if self.accelerator.is_main_process:
            with self.ema.swapped_into(self.model):
                self.log.say(f"sample grid: {self.on_sample(self.model, step)}")
        self.accelerator.wait_for_everyone()

    def save(self, step, stays):
        """Write the checkpoint of a step on the main process; one that does not stay makes way for later ones."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            path = checkpoint_path(self.run_dir, step)
            save_checkpoint(
                path,
                model=self.model.state_dict(),
                ema=self.ema.state_dict(),
                opt=self.optimizer.state_dict(),
                scaler=scaler.state_dict() if scaler is not None else None,
                steps=step,
                train_state={"skipped_steps": self.skipped, "samples_seen": step * self.config.batch_size},
                **self.saved,
            )
            self.log.say(f"checkpoint: {path}")
            roll(self.run_dir, step, stays, keep=ROLLING_KEPT)
        self.accelerator.wait_for_everyone()


def changed_flags(before, now):
    """What is trained otherwise than before a resume, in words; a change of what bears on no number is left out."""
    silent = {"data_dir", "output_dir", "exp_name", "logging_dir", "report_to", "num_workers", "resume_step", "vae"}
    silent |= {name for name in now if name.endswith("_steps")} | {"model_options"}
    names = [name for name in now if name not in silent and before.get(name) != now[name]]
    return [f"{shown(name)} was {before.get(name)}, is {now[name]}" for name in names]


def describe_data(dataset):
    """What a checkpoint records of its data, JSON-like: classes, VAE, shapes."""
    info = dataclasses.asdict(dataset.info)
    spec = info.pop("spec")
    info["moments_shape"] = list(info["moments_shape"])
    info["class_names"] = list(info["class_names"]) if info["class_names"] else None
    return {**info, **spec}

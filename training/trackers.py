"""Trackers of --report-to, which also get the numbers of the log: TensorBoard, Weights & Biases; --logging-dir.

A resumed run continues there under its own name, rewound to the step that it resumes from.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

from common.errors import InputError, first_line, note

PROJECT = "deepflow"


def check_tracker(name):
    """Raise InputError early if the tracker is not installed, or W&B is not logged in."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--report-to {name} needs a package: pip install {name}")
    if name == "wandb" and os.environ.get("RANK", "0") == "0" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        with failing_in_one_line(wandb):
            wandb.login()


@contextlib.contextmanager
def failing_in_one_line(wandb):
    """Turn W&B's errors into an InputError."""
    try:
        yield
    except wandb.Error as error:
        remedy = "run wandb login, set WANDB_MODE=offline, or pass --report-to none"
        raise InputError(f"--report-to wandb: {first_line(error)}; {remedy}") from None


def folder_of(config):
    """Folder of tracker files: --logging-dir in the run's folder; if absolute, a folder in it named after the run."""
    place = Path(config.logging_dir)
    return place / config.exp_name if place.is_absolute() else config.folder / place


@contextlib.contextmanager
def tracking(config, start):
    """A function (values, step) that sends {name: number} to the tracker, which discards steps after `start`."""
    flags, folder = dataclasses.asdict(config), folder_of(config)
    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / PROJECT, purge_step=start + 1) as writer:
            writer.add_text("config", json.dumps(flags, indent=1), start)

            def send(values, step):
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            yield send
    elif config.report_to == "wandb":
        folder.mkdir(parents=True, exist_ok=True)  # W&B would use a temporary folder instead
        with wandb_run(config.exp_name, folder, start) as run:
            run.config.update(flags, allow_val_change=True)

            def send(values, step):
                if step >= run.starting_step:  # W&B rejects steps that it already has
                    run.log(values, step=step)

            yield send
    else:
        yield lambda values, step: None


@contextlib.contextmanager
def wandb_run(name, folder, start):
    """The W&B run, rewound to a step, until the context ends. Raises InputError."""
    import wandb

    run, shared = None, {"project": PROJECT, "id": wandb_id(name), "name": name, "dir": str(folder)}
    with failing_in_one_line(wandb):
        if start:
            try:
                run = wandb.init(**shared, resume_from=f"{shared['id']}?_step={start}")
            except wandb.Error as error:  # not every server supports it
                note(f"warning: W&B cannot rewind the run ({first_line(error)}); no step is sent to it twice")
        run = run or wandb.init(**shared, resume="allow")
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def wandb_id(name):
    """The run's name in characters allowed in an id, with a hash if that changes it."""
    kept = "-".join(re.findall(r"[\w.-]+", name, re.ASCII))[:50]
    return kept if kept == name else f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")

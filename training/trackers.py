"""Where --report-to sends the numbers of the log as well, in the folder --logging-dir: TensorBoard, Weights & Biases.

A resumed run continues there under its own name, set back to the step that it resumes from.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re

from common.errors import InputError, first_line, note

PROJECT = "deepflow"


def check_tracker(name):
    """Raise InputError where the tracker is not installed, or W&B has no login; before hours are spent."""
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


@contextlib.contextmanager
def tracking(config, start):
    """A function (values, step) that sends {name: number} to the tracker; steps after `start` are forgotten there."""
    flags, folder = dataclasses.asdict(config), config.folder / config.logging_dir
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
        folder.mkdir(parents=True, exist_ok=True)  # W&B would take a temporary folder instead
        with wandb_run(config.exp_name, folder, start) as run:
            run.config.update(flags, allow_val_change=True)

            def send(values, step):
                if step >= run.starting_step:  # W&B refuses those that it has
                    run.log(values, step=step)

            yield send
    else:
        yield lambda values, step: None


@contextlib.contextmanager
def wandb_run(name, folder, start):
    """The run of W&B, set back to a step, until the context ends. Raises InputError."""
    import wandb

    run, shared = None, {"project": PROJECT, "id": wandb_id(name), "name": name, "dir": str(folder)}
    with failing_in_one_line(wandb):
        if start:
            try:
                run = wandb.init(**shared, resume_from=f"{shared['id']}?_step={start}")
            except wandb.Error as error:  # not every server can
                note(f"warning: W&B does not set the run back ({first_line(error)}); no step is sent to it twice")
        run = run or wandb.init(**shared, resume="allow")
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def wandb_id(name):
    """The run's name in characters that an id may have, with a hash where that changes it."""
    kept = "-".join(re.findall(r"[\w.-]+", name, re.ASCII))[:50]
    return kept if kept == name else f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")

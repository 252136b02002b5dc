"""Writing and finding the checkpoints of a run: plain tensors and JSON-like data, complete or absent."""

import dataclasses
import fcntl
import os
from pathlib import Path

import torch

from common.errors import InputError
from common.files import write_atomically, write_json
from common.records import Count, check_record, read_record
from models.checkpoints import load_strictly, read_file


@dataclasses.dataclass
class Checkpoint:
    """Content of a checkpoint: state dicts, and JSON-like data."""

    model: dict
    ema: dict
    opt: dict
    steps: Count
    train_state: dict[str, int]
    data: dict
    config: dict
    scaler: dict | None = None


def checkpoint_path(run_dir, step):
    return Path(run_dir) / "checkpoints" / f"{step:07d}.pt"


def existing_steps(run_dir):
    """Steps that a run has checkpoints of, ascending."""
    files = (Path(run_dir) / "checkpoints").glob("*.pt")
    return sorted(int(path.stem) for path in files if path.stem.isdigit())


def find_resume(run_dir, wanted):
    """Checkpoint to resume from, None for a fresh start; wanted: the text of --resume. Raises InputError.

    Neither a fresh start nor the checkpoint of another run ever overwrites a run that has checkpoints.
    """
    steps = existing_steps(run_dir)
    if wanted in ("auto", "latest") and steps:
        return checkpoint_path(run_dir, steps[-1])
    if wanted == "latest":
        raise InputError(f"--resume latest: {run_dir} holds no checkpoint; --resume auto starts where there is none")
    fresh = wanted == "auto" or (wanted.isdigit() and int(wanted) == 0)
    path = checkpoint_path(run_dir, int(wanted)) if wanted.isdigit() else Path(wanted)
    if not fresh and not path.is_file():
        raise InputError(f"--resume {wanted}: {path} does not exist; the run has steps {steps}")
    if steps and (fresh or path.resolve().parent != checkpoint_path(run_dir, 0).resolve().parent):
        held = f"{run_dir} already holds checkpoints up to step {steps[-1]}"
        raise InputError(f"{held}; pass --resume auto to continue, or another --exp-name")
    return None if fresh else path


def lock_run(run_dir):
    """Hold the run's folder while the returned file is open, so that no second run writes there. Raises InputError."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    file = open(Path(run_dir) / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"another process trains in {run_dir}; wait for it, or choose another --exp-name") from None
    except OSError:
        pass  # a file system without locks
    return file


def rolling_record(run_dir):
    """The file that lists the steps of rolling checkpoints, ascending."""
    return checkpoint_path(run_dir, 0).with_name("rolling.json")


def read_rolling(run_dir):
    record = rolling_record(run_dir)
    return read_record(list[int], record, "delete it: its checkpoints then stay") if record.exists() else []


def note_rolling(run_dir, step, stays):
    """Note in rolling.json that the checkpoint of `step` may be deleted later, unless it stays.

    It is noted before it is written, so that a kill in between leaves no checkpoint that nothing deletes. Only noted
    checkpoints are ever deleted: a run may continue with other intervals than it began with.
    """
    before = read_rolling(run_dir)
    others = [old for old in before if old != step and checkpoint_path(run_dir, old).exists()]
    noted = others if stays else sorted([*others, step])
    if noted != before:
        write_json(rolling_record(run_dir), noted)


def delete_old(run_dir, keep):
    """Delete all rolling checkpoints but the newest `keep`."""
    noted = read_rolling(run_dir)
    for old in noted[:-keep]:
        checkpoint_path(run_dir, old).unlink(missing_ok=True)
    if len(noted) > keep:
        write_json(rolling_record(run_dir), noted[-keep:])


def set_aside_after(run_dir, step):
    """Rename checkpoints later than `step`, where a run resumes, to .pt.abandoned; returns their steps.

    Otherwise `latest` would find the abandoned branch.
    """
    later = [other for other in existing_steps(run_dir) if other > step]
    for other in later:
        path = checkpoint_path(run_dir, other)
        os.replace(path, path.with_name(path.name + ".abandoned"))
    return later


def remove_leftovers(run_dir):
    """Delete half-written checkpoints of killed processes: large files that nothing would ever read."""
    for path in (Path(run_dir) / "checkpoints").glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def save_checkpoint(path, **content):
    """Write a checkpoint, whole or not at all. Raises OSError, for example when the disk is full."""

    def write(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # after a failed write torch's writer complains in turn
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    write_atomically(path, write)


def read(path, data):
    """The Checkpoint in a file; data: that of the current run, which must be of the same kind. Raises InputError."""
    content = check_record(Checkpoint, read_file(path), path, "choose a checkpoint of a run to resume from")
    for key in ("num_classes", "family", "scale", "shift", "moments_shape", "text"):
        if (before := content.data.get(key)) != (now := data.get(key)):
            trained = f"{path} was trained on data with {key} {before}"
            raise InputError(f"{trained}, --data-dir has {now}; resume on the same data")
    return content


def restore(content, path, model, ema, optimizer, scaler):
    """Restore model, EMA, optimizer and scaler in place from the Checkpoint of the file `path`. Raises InputError."""
    load_strictly(model, content.model, path)
    ema.load_state_dict(content.ema)
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(content.opt)
    for state in optimizer.state.values():  # on CPU they are still the file's pages, and the file may be deleted
        state.update({name: value.clone() for name, value in state.items()})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # learning rate and the like are those of the flags, not those of the file
    if scaler is not None and content.scaler:
        scaler.load_state_dict(content.scaler)

"""Writing and finding the checkpoints of a run: plain tensors and JSON-like data, complete or absent."""

import contextlib
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from common.errors import InputError
from common.files import write_atomically, write_json
from common.records import Count, Whole, check_record, read_record
from models.checkpoints import STEP, Plain, checkpoint_path, existing_steps, is_plain, read_file
from models.presets import PRESETS
from models.specs import LatentSpec, Options, TextSpec

REMEDY = "choose a checkpoint of a run to resume from"
OURS_ALONE = (
    "--resume takes only checkpoints of this repository; --init-from starts a run from a published file, and "
    "generate.py --ckpt samples it"
)


@dataclasses.dataclass
class TrainState:
    """The counters of a run; files of older runs lack some."""

    bad_steps: Whole
    bad_steps_in_a_row: Whole
    noise_block: Whole = 0  # rows; 0: written before blocks existed


@dataclasses.dataclass
class Source:
    """A file that a run reads at every start, and the hash of the weights taken from it."""

    file: str
    sha256: str


@dataclasses.dataclass
class Settings:
    """The part of a run's configuration that readers rely on."""

    model: Literal[tuple(PRESETS)]
    model_options: Options
    changes: list[dict] = dataclasses.field(default_factory=list)
    teacher_source: Source | None = None


@dataclasses.dataclass
class Group:
    params: list[int]


@dataclasses.dataclass
class Optimizer:
    """State of AdamW; the other entries of its groups are set by flags."""

    state: dict
    param_groups: list[Group]


@dataclasses.dataclass
class Checkpoint:
    """Content of a checkpoint: state dicts, and JSON-like data."""

    model: dict
    ema: dict
    opt: Optimizer
    steps: Count
    train_state: TrainState
    data: dict[str, Plain]
    config: dict[str, Plain]
    scaler: dict | None = None


def find_resume(run_dir, wanted):
    """Checkpoint to resume from, None for a fresh start; wanted: the text of --resume. Raises InputError.

    Neither a fresh start nor the checkpoint of another run ever overwrites a run that has checkpoints.
    """
    steps = existing_steps(run_dir)
    if wanted in ("auto", "latest") and steps:
        return checkpoint_path(run_dir, steps[-1])
    if wanted == "latest":
        raise InputError(f"--resume latest: {run_dir} holds no checkpoint; --resume auto starts where there is none")
    number = int(wanted) if STEP.fullmatch(wanted) else None
    fresh = wanted == "auto" or number == 0
    path = Path(wanted) if number is None else checkpoint_path(run_dir, number)
    if not fresh and not os.path.isfile(path):  # pathlib's is_file raises OSError for absurd names
        raise InputError(f"--resume {wanted}: {path} does not exist; the run has steps {steps}")
    if steps and (fresh or path.resolve().parent != checkpoint_path(run_dir, 0).resolve().parent):
        held = f"{run_dir} already holds checkpoints up to step {steps[-1]}"
        raise InputError(f"{held}; pass --resume auto to continue, or another --exp-name")
    return None if fresh else path


@contextlib.contextmanager
def replacing_old(run_dir, step, stays, keep):
    """Write the checkpoint of `step` in this context; on exit all rolling ones but the newest `keep` are deleted.

    Unless it `stays`, its step is added to rolling.json before it is written, so that a kill leaves no file that is
    never deleted. Only steps listed there are deleted: a run may continue with other intervals than it began with.
    """
    record = checkpoint_path(run_dir, 0).with_name("rolling.json")
    before = read_record(list[int], record, "delete it: its checkpoints then stay") if record.exists() else []
    rolling = [old for old in before if old != step and checkpoint_path(run_dir, old).exists()]
    rolling += [] if stays else [step]
    write_json(record, rolling)
    yield
    for old in rolling[:-keep]:
        checkpoint_path(run_dir, old).unlink(missing_ok=True)
    write_json(record, rolling[-keep:])


def clear_way(run_dir, step):
    """Remove half-written files, and rename checkpoints after `step` to .pt.abandoned, which `latest` does not find."""
    for place in ("", "checkpoints", "samples"):  # not of programs that sample or measure the run
        for path in Path(run_dir, place).glob(".*.tmp"):
            path.unlink(missing_ok=True)
    for path in (checkpoint_path(run_dir, other) for other in existing_steps(run_dir) if other > step):
        print(f"{path} is set aside as {path.name}.abandoned", flush=True)
        os.replace(path, f"{path}.abandoned")


def save_checkpoint(path, **content):
    """Write a checkpoint, whole or not at all. Raises OSError, for example when the disk is full."""
    write_atomically(path, lambda file: torch.save(content, file))


def on_host(content):
    """Copy nested dicts, tensors to host memory; copies from a GPU are asynchronous, so the caller must wait."""
    if isinstance(content, dict):
        return {name: on_host(value) for name, value in content.items()}
    if not isinstance(content, torch.Tensor):
        return content
    # a GPU copies at full speed only to page-locked memory; torch caches freed blocks of it for the next checkpoint
    return torch.empty_like(content, device="cpu", pin_memory=content.is_cuda).copy_(content, non_blocking=True)


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one after the other, while training continues.

    A full disk is reported by RunLog.reporting_disk_errors: a rolling checkpoint warns at once; for one that stays, the
    next `save` or `check` raises InputError. The context of `pool` ends once nothing is being written.
    """

    def __init__(self, run_dir, keep, log):
        self.run_dir, self.keep, self.log = run_dir, keep, log
        self.pool, self.writing = ThreadPoolExecutor(1), None

    def save(self, step, stays, content):
        """Write the content as it is now; unless the checkpoint `stays`, later ones replace it."""
        self.check(wait=True)  # never two at a time, on the disk or in host memory
        content = on_host(content)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self.writing = self.pool.submit(self._write, step, stays, content)

    def _write(self, step, stays, content):
        path = checkpoint_path(self.run_dir, step)
        with self.log.reporting_disk_errors(path, stays), replacing_old(self.run_dir, step, stays, self.keep):
            save_checkpoint(path, **content)
            self.log.say(f"checkpoint: {path}")

    def check(self, wait=False):
        """Raise the exception of the last write, if it has ended; wait: wait for its end."""
        if self.writing and (wait or self.writing.done()):
            self.writing.result()


def read(path, info):
    """The Checkpoint in a file; info: DataInfo of the current run, which must match. Raises InputError."""
    content = check_record(Checkpoint, read_file(path), path, OURS_ALONE)
    check_record(Settings, content.config, f"{path}, config", REMEDY)
    for key, now in (("num_classes", info.num_classes), ("moments_shape", list(info.moments_shape))):
        if (before := content.data.get(key)) != now:
            trained = f"{path} was trained on data with {key} {before}"
            raise InputError(f"{trained}, --data-dir has {now}; resume on the same data")
    names, now = content.data.get("class_names"), getattr(info, "class_names", None)
    if names and now and list(names) != list(now):
        fault = f"{path} was trained on classes with other names, or in another order, than those of --data-dir"
        raise InputError(f"{fault}; resume on the same data")
    check_encoders(content.data, info, path, REMEDY)
    return content


def check_encoders(data, info, where, remedy):
    """Raise InputError unless the encoders in `data`, from the file `where`, are those in info, of the current run."""
    specs = [(LatentSpec, data, info.spec)]
    if hasattr(info, "text"):
        specs.append((TextSpec, data.get("text"), info.text))
    for kind, found, now in specs:
        check_record(kind, found, f"{where}, data", remedy).check_same(now, where, "--data-dir")


def restore(content, path, model, ema, optimizer, scaler):
    """Restore a Checkpoint of the file `path` in place. Raises InputError if it differs, before any change."""
    groups = optimizer.state_dict()["param_groups"]
    check_same([group.params for group in content.opt.param_groups], [group["params"] for group in groups], path, "opt")
    check_same(content.opt.state, adam_state(optimizer), path, "opt")
    check_same(content.model, model.state_dict(), path, "model")
    check_same(content.ema, ema.state_dict(), path, "ema")
    if scaler is not None and content.scaler is not None:
        check_same(content.scaler, scaler.state_dict(), path, "scaler")
        scaler.load_state_dict(content.scaler)
    model.load_state_dict(content.model)
    ema.load_state_dict(content.ema)
    # the learning rate and other settings come from the flags, not from the file
    optimizer.load_state_dict({"state": content.opt.state, "param_groups": groups})
    for state in optimizer.state.values():  # on CPU they are still the file's pages, and the file may be deleted
        state.update({name: value.clone() for name, value in state.items()})


def adam_state(optimizer):
    """The form of AdamW's state after a step: {index of the parameter: {name: tensor of that shape and dtype}}."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}


def check_same(found, expected, path, where):
    """Raise InputError at the first difference in names, types, shapes or dtypes of nested dicts and lists."""
    if (has := form(found)) != (needs := form(expected)):
        raise InputError(f"{path} is of another model: its {where} has {has!s:.80}, this run {needs!s:.80}; {REMEDY}")
    if isinstance(expected, dict):
        if unequal := found.keys() ^ expected.keys():
            name = min(unequal, key=str)
            fault = "Missing" if name in expected else "Unexpected"
            raise InputError(f"{path} is of another model: {fault} {name} in its {where}; {REMEDY}")
        for name, value in expected.items():
            check_same(found[name], value, path, f"{where} {name}")


def form(value):
    """What must agree between two states at one place: type, dtype and shape of a value, as text; lists as they are."""
    if not isinstance(value, torch.Tensor):
        return "dict" if isinstance(value, dict) else value if isinstance(value, list) else type(value).__name__
    kind = f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return kind if is_plain(value) and value.is_contiguous() else f"{kind} in another layout"

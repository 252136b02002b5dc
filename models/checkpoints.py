"""Reading model files: ours and published ones, recognised by their keys. Loading is strict.

A file of ours carries its configuration, and so does a folder that models/export.py wrote, here or on the hub. What is
known about a published one is in models/published.py.
"""

import argparse
import dataclasses
import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
from pydantic import Strict
from safetensors.torch import load_file

from common.errors import InputError, first_line, note, system_fault, unreadable
from common.files import regular
from common.flags import shown
from common.records import Whole, check_record, read_record
from models.deepflow import DeepFlow
from models.hub import CONFIG_FILE, VAE_FOLDER, WEIGHTS_FILE, download, is_on_hub, pin
from models.layers import DrawsNothing
from models.paths import PATHS
from models.presets import build, constructor_defaults, kind_of, parse_df_idxs
from models.published import from_published
from models.specs import Options

REMEDY = "copy it again, or name another"
STEP = re.compile("[0-9]{1,18}")
ENTRIES = {"ema": "ema", "raw": "model"}  # --weights → entry of a file
Plain = Union[(None, *(Annotated[kind, Strict()] for kind in (bool, int, float, str, list, tuple, dict)))]  # no tensors


@dataclasses.dataclass
class Run:
    """The part of a run's configuration that is read back."""

    model_options: Options
    model: str | None = None
    exp_name: str | None = None
    path_type: Literal[tuple(PATHS)] | None = None
    cfg_prob: float | None = None


@dataclasses.dataclass
class About:
    """What a file holds besides its weights."""

    config: Run = None  # of this repository's files
    data: dict[str, Plain] = dataclasses.field(default_factory=dict)
    steps: Whole | None = None
    args: Any = None  # of a published file


@dataclasses.dataclass
class TrainingData:
    """What a file says about the training data, besides the LatentSpec."""

    count: Whole | None = None
    class_names: list[str] | None = None  # by number


def checkpoint_path(run_dir, step):
    return Path(run_dir) / "checkpoints" / f"{step:07d}.pt"


def existing_steps(run_dir):
    """Steps of a run's checkpoints, ascending."""
    files = (Path(run_dir) / "checkpoints").glob("*.pt")
    return sorted(int(path.stem) for path in files if STEP.fullmatch(path.stem) and path.is_file())


def find_checkpoint(path, flag="--ckpt", quiet=False):
    """The newest checkpoint of a run's folder, `user/repo@COMMIT` of a repository, or the path.

    Prints what it found in a run, unless quiet. flag: the one that gave `path`. Raises InputError.
    """
    if is_on_hub(path):
        return pin(str(path), flag)
    if not os.path.isdir(os.path.join(path, "checkpoints")):
        return path
    if not (steps := existing_steps(path)):
        raise InputError(f"{path} holds no checkpoint yet; train further, or name another run or a file")
    newest = checkpoint_path(path, steps[-1])
    if not quiet:
        note(f"{path}: using {newest}, its newest checkpoint")
    return newest


def read_file(path):
    """Content of a checkpoint, a .safetensors file or an exported folder. Raises InputError naming the file."""
    path = download(str(path)) if is_on_hub(path) else Path(path)
    return read_folder(path) if path.is_dir() else read_weights_file(path)


def read_weights_file(path):
    """Content of a checkpoint or a .safetensors file (which has no checksums). Raises InputError naming the file."""
    try:
        if regular(path).suffix == ".safetensors":
            return load_file(path)
        # Memory-mapped, so that eight processes share one copy; torch's old format, which is not a zip, cannot be.
        is_mappable = zipfile.is_zipfile(path) and check_sums(path)
        # Published files hold an argparse.Namespace beside the weights: it is harmless and allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; name another") from None
    except OSError as error:
        raise unreadable(error, f"checkpoint {path}", "name another") from None
    except Exception as error:  # in a damaged file the unpickler can fail with anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            fault = f"holds the Python object {refused[1]}, which is not loaded: it could run code"
            raise InputError(f"checkpoint {path} {fault}; save the weights alone") from None
        fault = f"checkpoint {path} is unreadable or truncated ({first_line(error)[:120]}); copy it again"
        raise InputError(system_fault(error, path) or fault) from None


def check_sums(path):
    """Raise BadZipFile if an entry fails its checksum, which reading through a memory map does not verify.

    Returns whether all entries are uncompressed, as written by torch.save: others must not be memory-mapped.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def read_folder(folder):
    """Content of an exported folder, in the form of a checkpoint of ours. Raises InputError naming the file."""
    where, remedy = folder / CONFIG_FILE, "name a .pt file, a run's folder, or an exported folder"
    config = read_record(dict, where, remedy)
    run = check_record(dict, config.get("run", {}), f"{where}, run", remedy)
    weights = check_record(Literal[tuple(ENTRIES)], config.get("weights", "ema"), f"{where}, weights", remedy)
    data = check_record(dict, config.get("data", {}), f"{where}, data", remedy)
    if (folder / VAE_FOLDER).is_dir():
        data["vae"] = str(folder / VAE_FOLDER)
    defaults = constructor_defaults(kind_of(config))
    options = {name: config.get(name, default) for name, default in defaults.items()}
    return {
        ENTRIES[weights]: read_weights_file(folder / WEIGHTS_FILE),
        "config": {**run, "model_options": options},
        "data": data,
        "steps": config.get("steps"),
    }


@dataclasses.dataclass
class Checkpoint:
    """A model and what its file says about it; run and data are empty and steps is None for published files."""

    model: DeepFlow
    options: dict  # constructor arguments
    run: dict  # the run's configuration
    data: dict  # classes, VAE and shapes of the training data
    steps: int | None
    path: str

    def data_as(self, kind):
        """Its data as the record `kind`, such as LatentSpec or TrainingData. Raises InputError."""
        return check_record(kind, self.data, f"{self.path}, data", "choose another file")

    def weights_sha256(self):
        """SHA-256 of the weights, the same for every copy or export of them."""
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def load_checkpoint(path, weights="ema", **overrides):
    """Checkpoint with the model in eval mode, from our file, a run's folder (its newest) or a published file.

    weights: "ema" or "raw" (the entry "model"); overrides: constructor arguments that a published file leaves open or
    states differently, and its convention and path_type. Raises InputError if the file lacks what is asked for, or its
    parts contradict each other.
    """
    path = find_checkpoint(path)
    content = read_file(path)
    state = pick_weights(content, weights, path)
    found = check_record(About, content, path, REMEDY)
    run, data = {}, {}
    try:
        if found.config is not None:
            run, data = check_record(dict[str, Plain], content["config"], f"{path}, config", REMEDY), found.data
            options = run["model_options"]
        else:
            state, options, path_type = from_published(state, path, found.args, overrides)
            run = {"path_type": path_type} if path_type else {}
        options = check_overrides(options, overrides, path)
        check_counts(options, state, path)
        with torch.device("meta"), DrawsNothing():  # spends no time on initial weights
            model = build(options)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # names, shapes or settings
        reason = f"DeepFlow, SiT, REPA, DMF, MMDiT; {first_line(error)[:120]}"
        raise InputError(f"{path} holds no model of a known family ({reason}); {REMEDY}") from None
    load_strictly(model, state, path)
    model.about = {"options": options, "run": run, "data": data, "steps": found.steps, "path": str(path)}
    return Checkpoint(model.float().eval(), **model.about)


def load_model(path, weights="ema", **overrides):
    """Model in eval mode and its constructor arguments; everything else as load_checkpoint.

    `sampling.sample` takes the model, whose attribute `about` holds the other fields of its Checkpoint.
    """
    checkpoint = load_checkpoint(path, weights, **overrides)
    return checkpoint.model, checkpoint.options


def pick_weights(content, weights, path):
    """The state dict `weights` ("ema" or "raw") of a file's content, wrapper prefixes stripped."""
    key, entries = ENTRIES[weights], content if isinstance(content, dict) else {f"a {type(content).__name__}": content}
    state = entries if "x_embedder.proj.weight" in map(strip_prefix, entries) else entries.get(key)
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) and is_plain(t) for t in state.values()):
        held = ", ".join(map(str, list(entries)[:6])) or "nothing"
        fault = f"{path} lacks tensors '{key}' (it holds {held:.200})"
        raise InputError(f"{fault}; name other --weights or another file")
    stripped = {strip_prefix(name): tensor for name, tensor in state.items()}
    if len(stripped) < len(state):
        raise InputError(f"{path} holds parameters twice, as NAME and module.NAME; save them once")
    return stripped


def is_plain(tensor):
    """Whether a tensor is a dense floating-point tensor with data."""
    has_data = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    return has_data and tensor.is_floating_point()


def strip_prefix(name):
    """Parameter name without what DDP (`module.`) and torch.compile (`_orig_mod.`) put before it, in any nesting."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def load_strictly(model, state, path):
    """load_state_dict, with torch's first complaint in one line of InputError."""
    try:
        model.load_state_dict(state, assign=model.pos_embed.is_meta)  # nothing can be copied into a meta tensor
    except RuntimeError as error:
        complaint = str(error).strip().splitlines()[:2][-1].strip()  # the line after torch's heading
        raise InputError(f"{path} is of another model: {complaint[:240]}; {REMEDY}") from None


def check_counts(options, state, path):
    """Raise InputError if the file has too few parameters for the stated numbers of blocks and projectors."""
    projectors = len(options["z_dims"]) * max(1, len(options["df_idxs"])) if options.get("ssl_align") else 0
    if 10 * options["depth"] + 6 * projectors > len(state):  # parameters of a block, of a projector
        fault = f"it has fewer parameters than {options['depth']} blocks and {projectors} projectors"
        raise InputError(f"{path} is of another model: {fault}; {REMEDY}")


def check_overrides(options, overrides, path):
    """Constructor arguments with those given on the command line. Raises InputError if they contradict the file."""
    options = {**options, "df_idxs": tuple(options["df_idxs"])}
    for key, value in overrides.items():
        if value is None or key in ("convention", "path_type"):
            continue
        if key == "df_idxs":
            value = parse_df_idxs(value)
        if key == "dmf_depth" and kind_of(options) != "flow map":
            raise InputError(f"--dmf-depth {value}: {path} is a flow model; train_dmf.py turns it into a flow map")
        if key == "num_classes" and kind_of(options) == "text":
            raise InputError(f"--num-classes {value}: {path} is a text-to-image model; sample it with generate_t2i.py")
        if options.get(key, False if key == "ssl_align" else value) != value:
            flag, held = shown("trans_depth" if key == "depth" else key), options.get(key, False)
            raise InputError(f"{flag} {value} contradicts {path}, which has {held}; leave the flag out")
        options[key] = value
    return options

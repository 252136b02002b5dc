"""Tiny data folders, VAEs, runs and checkpoints, made in seconds on a CPU."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import generate
import train
import train_dmf
import training.run
from common.flags import parse_flags
from latents.manifest import FORMAT, LABELS_JSON, MANIFEST, NAMES, VERSION
from latents.names import pack_names
from models import create_model, model_config
from models.deepflow import DeepFlow
from models.encoders import ENCODERS
from models.specs import LatentSpec
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 3
SIZE = 8  # side of the latents
SPEC = LatentSpec(vae="tiny-vae", family="tiny-vae", scale=0.5, shift=0.0, channels=4, factor=2)
MODEL = {"model": "DeepFlow-Ti/2", "trans_depth": 2, "df_idxs": "1"}


FLOPS = {}  # of models whose layers and shapes are these


def count_flops(model, count=training.run.count_flops):
    """The multiply-adds of a run's model, traced once for all runs of its size: that takes a third of a tiny run."""
    size = str(model), tuple((name, parameter.shape) for name, parameter in model.named_parameters())
    if size not in FLOPS:
        FLOPS[size] = count(model)
    return FLOPS[size]


training.run.count_flops = count_flops


def data_folder(folder, count=12, spec=SPEC, labels=None, shape=None, mean=None, manifest=True):
    """A folder of moments; image i has class i mod CLASSES. mean: (count, C, h, w) instead of random ones.

    manifest False: the published layout, which does not say which VAE or how many classes.
    """
    shape = shape or (2 * spec.channels, SIZE, SIZE)
    vae_sd = Path(folder) / "vae-sd"
    vae_sd.mkdir(parents=True)
    rng = np.random.default_rng(7)
    moments = rng.standard_normal((count, *shape), dtype=np.float32)
    moments[:, shape[0] // 2 :] = 0.1
    if mean is not None:
        moments[:, : shape[0] // 2] = mean
    names = [f"img-mean-std-{i:08d}.npy" for i in range(count)]
    for name, array in zip(names, moments, strict=True):
        np.save(vae_sd / name, array)
    labels = [i % CLASSES for i in range(count)] if labels is None else labels
    (vae_sd / LABELS_JSON).write_text(json.dumps({"labels": list(zip(names, labels, strict=True))}))
    if manifest:
        content = {"format": FORMAT, "version": VERSION, "kind": "moments", "layout": "folder", "count": count}
        content.update(num_classes=CLASSES, latents=dataclasses.asdict(spec), shape=list(shape))
        (vae_sd / NAMES).write_bytes(pack_names([f"img{i}.png" for i in range(count)]))
        (vae_sd / MANIFEST).write_text(json.dumps(content))
    return Path(folder)


def aligned_folder(folder, count=12):
    """As data_folder, with latents of side 4 and the images of 32² that they belong to: 2 × 2 tokens of an encoder."""
    data = data_folder(folder, count, dataclasses.replace(SPEC, factor=8), shape=(2 * SPEC.channels, 4, 4))
    names = [f"img{i:02d}.png" for i in range(count)]
    (data / "images").mkdir()
    for name in names:
        Image.new("RGB", (32, 32)).save(data / "images" / name)
    (data / "vae-sd" / NAMES).write_bytes(pack_names(names))
    return data


def moments_file(data, index):
    """The file with the moments of image `index`."""
    return Path(data) / "vae-sd" / f"img-mean-std-{index:08d}.npy"


def vae_folder(folder, scale=0.5, blocks=2, channels=4, **options):
    """A diffusers AutoencoderKL with random weights, factor 2^(blocks − 1); its family is the folder's name."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scale,
        **options,
    )
    vae.save_pretrained(folder)
    return Path(folder)


def flags(**values):
    """Command line of keyword arguments: tg_upper_bound=0.1 → --tg-upper-bound 0.1, dry_run=False → --no-dry-run."""
    line = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def train_flags(data, output_dir, **changes):
    """Command line of a run of four steps on a model of two blocks and two branches; the run's name is `run`."""
    values = {"exp_name": "run", "data_dir": data, "output_dir": output_dir, **MODEL}
    values.update(batch_size=4, max_train_steps=4, sampling_steps=0, log_every=1, learning_rate=1e-3)
    return flags(**{**values, **changes})


def run_train(data, output_dir, **changes):
    """Train in this process; returns the run's folder."""
    with fresh_accelerate(), one_thread():
        config = parse_flags(TrainConfig, train_flags(data, output_dir, **changes))
        train.train(config)
    return Path(output_dir) / config.exp_name


def map_flags(data, output_dir, flow, **changes):
    """Command line of four steps of a flow map that starts from the flow model in the file `flow` (None: from none)."""
    start = {"init_from": flow} if flow else {"from_scratch": True}
    return train_flags(data, output_dir, **{"model": "DeepFlow-DMF-Ti/2", "dmf_depth": 1, **start, **changes})


def run_train_dmf(data, output_dir, flow, **changes):
    """Train a flow map in this process; returns the run's folder."""
    with fresh_accelerate(), one_thread():
        config = parse_flags(train_dmf.FlowMapConfig, map_flags(data, output_dir, flow, **changes))
        train_dmf.train(config)
    return Path(output_dir) / config.exp_name


def flow_file(path, **options):
    """A checkpoint of a tiny flow model that `map_flags` fits, made on latents of SPEC."""
    return checkpoint(path, SPEC.vae, **{"depth": 2, "df_idxs": (1,), **options})


def scrambled_run(data, output_dir, **changes):
    """A run with a checkpoint at step 1 whose weights are nowhere zero; returns its folder."""
    run_dir = run_train(data, output_dir, max_train_steps=1, **changes)
    path = run_dir / "checkpoints/0000001.pt"
    content = load(path)
    model = create_model(content["config"]["model"], **content["config"]["model_options"])
    content["model"] = content["ema"] = fill_(model, std=0.05).state_dict()
    content["train_state"]["noise_block"] = 3  # so that blocks span processes and micro-batches
    torch.save(content, path)
    return run_dir


@contextlib.contextmanager
def fresh_accelerate():
    """Accelerate keeps its state for the life of the process; runs of one test session must not share it."""
    reset_accelerate()
    try:
        yield
    finally:
        reset_accelerate()


@contextlib.contextmanager
def one_thread():
    """Models this small lose time with more, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_generate(ckpt, sample_dir, **changes):
    """Sample in this process; returns (folder of PNGs, arr_0, manifest)."""
    run_generate_only(ckpt, sample_dir, **changes)
    return results(sample_dir)


def run_generate_only(ckpt, sample_dir, **changes):
    """Sample in this process."""
    config = parse_flags(generate.GenerateConfig, generate_flags(ckpt, sample_dir, **changes))
    with one_thread():
        generate.generate(config.resolve())


def generate_flags(ckpt, sample_dir, **changes):
    """Command line of five images in batches of two with four SDE steps."""
    values = {"ckpt": ckpt, "sample_dir": sample_dir, "num_fid_samples": 5, "per_proc_batch_size": 2, "num_steps": 4}
    return flags(**{**values, **changes})


def results(sample_dir):
    """(folder of PNGs, arr_0, manifest) of the one result in a sample folder."""
    (npz,) = Path(sample_dir).glob("*.npz")
    return npz.with_suffix(""), np.load(npz)["arr_0"], json.loads(npz.with_suffix(".json").read_text())


def count_calls(monkeypatch):
    """List that fills with the number of rows of every DeepFlow.velocity call."""
    rows, velocity = [], DeepFlow.velocity

    def counted(self, x, t, y):
        rows.append(len(x))
        return velocity(self, x, t, y)

    monkeypatch.setattr(DeepFlow, "velocity", counted)
    return rows


def file_bytes(folder):
    """{name: content} of a folder's images."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def run_command(*command, **environment):
    """Run a command in the repository with one thread per process; returns the completed process."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def run_python(*command, **environment):
    return run_command(sys.executable, *command, **environment)


def run_torchrun(processes, *command):
    """Run a script under torchrun with so many processes, on a free port."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return run_python(*launcher, *command)


def fill_(model, seed=0, std=0.02):
    """Replace every trained parameter by N(0, std): at initialisation most layers give nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, std, generator=generator)
    return model


def checkpoint(path, vae, name="DeepFlow-Ti/2", steps=3, std=0.05, **overrides):
    """Write a checkpoint of a run with random weights, whose data were encoded with the VAE in the folder `vae`."""
    spec = dataclasses.replace(SPEC, vae=str(vae), family=Path(vae).name)
    options = model_config(name, **{"input_size": SIZE, "num_classes": CLASSES, **overrides})
    model, ema = (fill_(create_model(name, **options), seed, std).state_dict() for seed in (1, 2))
    data = {"count": 12, "num_classes": CLASSES, "moments_shape": [8, SIZE, SIZE], **dataclasses.asdict(spec)}
    config = {"model": name, "exp_name": "tiny", "path_type": "linear", "model_options": options}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model, "ema": ema, "steps": steps, "data": data, "config": config}, path)
    return Path(path)


def shrink_encoder(monkeypatch, name, width=24, depth=2, heads=2):
    """Make the network of an alignment encoder small; its files, input and output keep their form."""
    family = ENCODERS[name]
    options = {**family.options, "embed_dim": width, "depth": depth, "num_heads": heads}
    monkeypatch.setitem(ENCODERS, name, dataclasses.replace(family, width=width, options=options))


def encoder_file(name, folder, seed=0):
    """A file of an alignment encoder's authors with random weights."""
    import timm

    family, path = ENCODERS[name], Path(folder) / f"{name}-{seed}.pth"
    network = timm.create_model(family.timm_name, num_classes=0, **family.options)
    state = fill_(network, seed, std=0.2).state_dict()
    torch.save({family.entry: state} if family.entry else state, path)
    return path


def load(path):
    """Content of a checkpoint file."""
    return torch.load(path, weights_only=True)


def log_lines(run_dir, name="log.jsonl"):
    """Lines of log.jsonl, or of another file of the run."""
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def differences(a, b, where=""):
    """Places at which two nested structures of dicts, lists, tensors and numbers are not equal to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() ^ b.keys()
        found = [f"{where}/{key}" for key in keys]
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [where]


def largest_difference(a, b):
    """Largest |a − b| over two state dicts of the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)

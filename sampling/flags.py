"""The flags of generate.py and generate_t2i.py."""

import dataclasses
import re
from pathlib import Path

from common.errors import InputError
from common.flags import BATCH, BLOCKS, CLASSES, HIDDEN, IMAGES, SAMPLER_STEPS, SEED, SIDE, Range, flag, required
from models.flags import PublishedFlags
from models.presets import PRESETS

DTYPES = ["bf16", "fp16", "fp32"]
MODES = ["sde", "ode", "euler", "restart"]
MODE = "sampler; euler and restart are for flow maps; default: sde, or euler for flow maps"
STEPS = "number of steps; default: 250 for sde, 50 for ode"
SAMPLE_DIR = "parent folder of the results; default: RUN/generated of a run's checkpoint, else samples"
MODEL, SAMPLING, BRANCHES, SPEED, OUTPUT = "model", "sampling", "branches", "precision and speed", "output"

GENEVAL_IMAGES = 4  # of each prompt
PROMPTS = (
    "prompts ('' is no text at all), or one file: text with a prompt per line, COCO's captions .json (one caption per "
    "image, drawn by the seed), GenEval's .jsonl (its folder layout is written)"
)


def gap(text):
    """A number, or text that BranchOptions checks."""
    try:
        return float(text)
    except ValueError:
        return text


@dataclasses.dataclass(kw_only=True)
class SamplingFlags(PublishedFlags):
    """Flags of every program that samples. None: taken from the checkpoint, or a default filled in later."""

    ckpt: str = required("checkpoint, run, exported folder, user/repo, file of DeepFlow, SiT, REPA or DMF", group=MODEL)
    weights: str = flag("ema", "which weights of the file", choices=["ema", "raw"], group=MODEL)
    model: str | None = flag(None, "preset name", str, choices=list(PRESETS), group=MODEL)
    trans_depth: int | None = flag(None, "number of blocks", int, range=BLOCKS, group=MODEL)
    qk_norm: bool | None = flag(None, "normalised queries and keys", bool, group=MODEL)
    ssl_align: bool | None = flag(None, "the model was trained with SSL alignment", bool, group=MODEL)
    projector_embed_dims: str | None = flag(None, HIDDEN, str, group=MODEL)
    path_type: str | None = flag(
        None, "default: the checkpoint's, else linear", str, choices=["linear", "cosine"], group=MODEL
    )
    resolution: int | None = flag(None, "image size", int, range=SIDE, group=MODEL)
    vae: str | None = flag(None, "ema, mse, a hub name or a folder; default: the training data's", str, group=MODEL)

    mode: str | None = flag(None, MODE, str, choices=MODES, group=SAMPLING)
    num_steps: int | None = flag(None, f"{STEPS}, 4 for euler, 4 for restart", int, range=SAMPLER_STEPS, group=SAMPLING)
    shift: float = flag(1.0, "of a flow map's times: s*t / (1 + (s - 1)*t)", range=Range(above=0), group=SAMPLING)
    heun: bool = flag(False, "second-order steps for ode", group=SAMPLING)
    cfg_scale: float = flag(1.0, "classifier-free guidance; 1.0 is none", group=SAMPLING)
    guidance_low: float = flag(0.0, "guide only at t >= this (t = 0 is data)", group=SAMPLING)
    guidance_high: float = flag(1.0, "guide only at t <= this (t = 1 is noise)", group=SAMPLING)
    global_seed: int = flag(
        0, "image i depends on it and on i; --seed is the same", range=SEED, also=["--seed"], group=SAMPLING
    )

    ig_scale: float = flag(1.0, "internal guidance, from a branch to the last; 1.0 is none", group=BRANCHES)
    ig_branch: int | None = flag(
        None, "that branch; default: the one before the last", int, range=BLOCKS, group=BRANCHES
    )
    ig_low: float = flag(0.0, "guide internally only at t >= this", group=BRANCHES)
    ig_high: float = flag(1.0, "guide internally only at t <= this", group=BRANCHES)
    cfg_exit: int | None = flag(
        None, "the unconditional half of --cfg-scale ends after this branch", int, range=BLOCKS, group=BRANCHES
    )
    exit_branch: int | None = flag(None, "every step ends after this branch", int, range=BLOCKS, group=BRANCHES)
    exit_schedule: str | None = flag(
        None, "0.8:1,0.3:2: from noise to t = 0.8 after branch 1, to 0.3 after 2", str, group=BRANCHES
    )
    branch_gap: float | str = flag(
        0.0, "time from a branch to the next, from -1 to 1, or dt: the last is where the step ends", gap, group=BRANCHES
    )

    dtype: str = flag("fp32", "precision of the network; the state is float64", choices=DTYPES, group=SPEED)
    vae_dtype: str = flag("fp32", "precision of the decoder", choices=DTYPES, group=SPEED)
    tf32: bool = flag(True, "TF32 matrix products on GPUs that have them", also=["--allow-tf32"], group=SPEED)
    fused_attn: bool = flag(True, "fused attention kernels", group=SPEED)
    compile: bool = flag(False, "compile the network's blocks at the start, for faster steps", group=SPEED)
    per_proc_batch_size: int = flag(
        32, "images per forward pass and process", range=BATCH, also=["--batch-size"], group=SPEED
    )
    decode_batch_size: int = flag(32, "images decoded at once", range=BATCH, group=SPEED)

    sample_dir: str | None = flag(None, SAMPLE_DIR, str, group=OUTPUT)
    num_fid_samples: int = flag(50_000, "number of images", range=IMAGES, also=["--num-samples"], group=OUTPUT)
    format: str = flag("both", "what is written", choices=["npz", "png", "both"], group=OUTPUT)
    decode: bool = flag(True, "decode to images; --no-decode writes an npz of latents", group=OUTPUT)
    resume: bool = flag(True, "resume an interrupted run; --no-resume refuses a folder with images", group=OUTPUT)
    grid: str | None = flag(None, "ROWSxCOLUMNS: write one picture instead", str, group=OUTPUT)
    out: str | None = flag(None, "file of the picture; default grid.png", str, group=OUTPUT)

    @property
    def sampler(self):
        """Row of the table of samplers."""
        from samplers import SAMPLERS  # here, as it imports torch

        return SAMPLERS["ode-heun" if self.heun else self.mode]

    @property
    def guidance(self):
        from samplers import Guidance

        return Guidance(self.cfg_scale, self.guidance_low, self.guidance_high)

    @property
    def branches(self):
        """The BranchOptions. Raises InputError for text that cannot be read."""
        from samplers import BranchOptions, InternalGuidance

        internal = InternalGuidance(self.ig_scale, self.ig_low, self.ig_high, self.ig_branch)
        return BranchOptions(internal, self.cfg_exit, self.exit_branch, self.exit_schedule, self.branch_gap)

    def branch_settings(self):
        """{name: value} of the BRANCH_FLAGS that are set and have an effect."""
        idle = [name for name in BRANCH_FLAGS if name.startswith("ig_") and self.ig_scale == 1.0]
        idle += ["cfg_exit"] * (self.cfg_scale == 1.0)
        found = {name: getattr(self, name) for name in BRANCH_FLAGS if name not in idle}
        return {name: value for name, value in found.items() if value != BRANCH_FLAGS[name]}

    def model_options(self):
        """Constructor arguments and path that flags give, for a file that does not hold them."""
        names = ("df_idxs", "dmf_depth", "legacy_scaling", "ssl_align", "convention", "path_type")
        return {"depth": self.trans_depth, **{name: getattr(self, name) for name in names}}

    def grid_size(self):
        """--grid as (rows, columns). Raises InputError."""
        match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", self.grid)
        if not match:
            raise InputError(f"--grid {self.grid!r} is not of the form 8x8 (rows x columns)")
        return int(match[1]), int(match[2])

    def batches(self):
        """Batches of image indices, the same on any number of processes, so that pixels do not depend on it."""
        indices, size = range(self.num_fid_samples), self.per_proc_batch_size
        return [indices[start : start + size] for start in indices[::size]]

    def resolve(self):
        """A copy with what --grid implies. Raises InputError for flags that conflict regardless of the model."""
        if self.heun and self.mode != "ode":
            raise InputError("--heun is a method for the ODE; pass --mode ode")
        if not self.decode and (self.format == "png" or self.grid):
            raise InputError("--no-decode keeps latents, in an npz; leave out --format png and --grid")
        if self.out and not self.grid:
            raise InputError("--out belongs to --grid; for many images pass --sample-dir")
        if self.out and Path(self.out).suffix.lower() != ".png":
            raise InputError(f"--out {self.out} must end in .png; its manifest lies beside it in a .json")
        _ = self.branches  # checks what needs no model
        config = dataclasses.replace(self)
        if config.grid:
            rows, columns = config.grid_size()
            config.num_fid_samples, config.out = rows * columns, config.out or "grid.png"
        return config

    def for_model(self, kind, k=1):
        """A copy with default mode and number of steps for a kind of model, of k branches. Raises InputError."""
        config = dataclasses.replace(self, mode=self.mode or ("euler" if kind == "flow map" else "sde"))
        config.num_steps = self.num_steps or config.sampler.num_steps
        if config.sampler.is_map and kind != "flow map":
            raise InputError(
                f"--mode {self.mode} needs a flow map, {self.ckpt} is a flow model; pass --mode sde or ode, "
                "or --dmf-depth for a published flow map without a log-variance head"
            )
        if self.shift != 1.0 and not config.sampler.is_map:
            raise InputError("--shift moves the times of flow maps; pass --mode euler or restart")
        times = config.sampler.times(config.num_steps, self.shift)
        self.guidance.check(times)
        self.branches.check(k, times, kind)
        return config


BRANCH_FLAGS = {  # {name: default} of the flags that need branches
    field.name: field.default for field in dataclasses.fields(SamplingFlags) if field.metadata["group"] == BRANCHES
}


@dataclasses.dataclass(kw_only=True)
class GenerateConfig(SamplingFlags):
    """Flags of generate.py."""

    num_classes: int | None = flag(None, "number of classes", int, range=CLASSES, group=MODEL)
    labels: str = flag("random", "random, balanced, or in turn: 207,robin or a file with one per line", group=SAMPLING)
    classes: str | None = flag(None, "classes of the grid, 207,robin: equally many of each", str, group=OUTPUT)

    def model_options(self):
        return {**super().model_options(), "num_classes": self.num_classes}

    def resolve(self):
        """As SamplingFlags.resolve, and for --classes."""
        config = super().resolve()
        if config.classes and not config.grid:
            raise InputError("--classes belongs to --grid; for many images pass --labels")
        if config.classes and config.labels != "random":
            raise InputError(f"--classes and --labels {config.labels} exclude each other; pass one")
        if config.classes and (count := len(config.classes.split(","))) > config.num_fid_samples:
            cells = f"{count} classes for {config.num_fid_samples} images"
            raise InputError(f"--classes names {cells}; pass a larger --grid")
        return config


@dataclasses.dataclass(kw_only=True)
class TextGenerateConfig(SamplingFlags):
    """Flags of generate_t2i.py; there are no text-to-image flow maps."""

    prompts: list = required(PROMPTS, str, nargs="+", group=SAMPLING, empty=True)
    images_per_prompt: int | None = flag(None, "default 1, for GenEval 4", int, range=IMAGES, group=SAMPLING)
    text_encoder: str | None = flag(None, "name or folder; default: the training data's", str, group=MODEL)
    mode: str | None = flag(None, "sampler; default: sde", str, choices=MODES[:2], group=SAMPLING)
    num_steps: int | None = flag(None, STEPS, int, range=SAMPLER_STEPS, group=SAMPLING)
    shift: float = flag(1.0, HIDDEN, range=Range(above=0), group=SAMPLING)
    dmf_depth: int | None = flag(None, HIDDEN, int, range=Range(low=1), group=MODEL)
    cfg_scale: float = flag(2.0, "classifier-free guidance with the empty caption; 1.0 is none", group=SAMPLING)
    num_fid_samples: int | None = flag(None, "default: --images-per-prompt each", int, range=IMAGES, group=OUTPUT)

    def resolve(self, source):
        """As SamplingFlags.resolve, with the number of images that a PromptList gives. Raises InputError."""
        config, prompts = super().resolve(), len(source.texts)
        config.images_per_prompt = config.images_per_prompt or (GENEVAL_IMAGES if source.metadata else 1)
        most = prompts * config.images_per_prompt
        count = config.num_fid_samples = config.num_fid_samples or most
        if config.grid and prompts > count:
            raise InputError(f"--grid {config.grid} has no room for {prompts} prompts; pass a larger one")
        if count > most and not config.grid:
            raise InputError(f"--num-fid-samples {count}: --prompts gives {most} images; raise --images-per-prompt")
        return config

    def prompt_of_each_image(self, texts):
        """Prompts of all images: a picture has equally many images of each."""
        if self.grid:
            return [texts[index * len(texts) // self.num_fid_samples] for index in range(self.num_fid_samples)]
        return [texts[index // self.images_per_prompt] for index in range(self.num_fid_samples)]

"""Sampling from Python: a function with the settings, checks and steps of generate*.py that returns the images.

from models import load_model
from sampling import sample

model, options = load_model("exps/first")
images = sample(model, classes=[207, 360], steps=50, mode="ode", cfg_scale=1.5, seed=0)
"""

import contextlib
import dataclasses
import functools
import re

import numpy as np

from common.errors import InputError, did_you_mean
from common.flags import parse_flags, shown
from common.precision import DTYPES
from models.checkpoints import Checkpoint
from models.codec import LatentCodec
from models.text import TextEncoder
from sampling.conditions import ClassLabels, PromptList, Prompts
from sampling.flags import BRANCH_FLAGS, GenerateConfig, TextGenerateConfig
from sampling.sampler import ImageSampler

KEYWORDS = {  # flag → keyword of `sample`, where the names differ
    "num_steps": "steps",
    "global_seed": "seed",
    "per_proc_batch_size": "batch_size",
    "help": "help(sample)",
}
SETTINGS = {"shift", "heun", "guidance_low", "guidance_high", "vae", "vae_dtype", "decode_batch_size", "decode"}
SETTINGS |= {"text_encoder", *BRANCH_FLAGS}
NAMED = {"classes", "prompts", "steps", "mode", "cfg_scale", "seed", "batch_size"}  # the other keywords of `sample`
# The last VAE and text encoder stay in memory for the next call, because loading them takes seconds.
load_codec, load_encoder = functools.lru_cache(1)(LatentCodec.load), functools.lru_cache(1)(TextEncoder)


def sample(
    model, classes=None, *, prompts=None, steps=None, mode=None, cfg_scale=None, seed=0, batch_size=32, **settings
):
    """An image for each of N classes, or of N prompts for text-to-image: NumPy array, uint8 (N, R, R, 3).

    model: from `load_model`, alone or with its options; it runs on its device and in its precision. classes: numbers,
    or names if the checkpoint has them. Image i depends only on its class or prompt and on (seed, i). settings: the
    other flags of generate.py in SETTINGS, such as heun=True, guidance_low=0.3, exit_branch=1. Defaults are those of
    the program. decode=False returns latents, float32 (N, C, h, w). Raises InputError.
    """
    model = model[0] if isinstance(model, tuple) else model
    given = {"mode": mode, "num_steps": steps, "cfg_scale": cfg_scale, "seed": seed, "per_proc_batch_size": batch_size}
    with naming_keywords():
        checkpoint = checkpoint_of(model)
        if unknown := sorted(settings.keys() - SETTINGS):
            remedy = f"{did_you_mean(unknown[0], NAMED | SETTINGS)}choose from {', '.join(sorted(SETTINGS))}"
            raise InputError(f"{unknown[0]} is not a setting of sample(); {remedy}")
        config, make_condition = condition_of(model.kind, classes, prompts, checkpoint, {**given, **settings})
        sampler = ImageSampler(config, make_condition, model.pos_embed.device, checkpoint, load_codec)
        return np.concatenate([wait() for _, wait in sampler.batches(config.batches())])


def checkpoint_of(model):
    """The Checkpoint of a model from `load_model`. Raises InputError for any other model."""
    if (about := getattr(model, "about", None)) is None:
        raise InputError("the model was not loaded from a checkpoint, which names its VAE; use load_model(PATH)")
    return Checkpoint(model, **about)


def condition_of(kind, classes, prompts, checkpoint, settings):
    """(resolved configuration, make_condition for ImageSampler) of the classes or prompts. Raises InputError."""
    wanted, unwanted, given = "classes", prompts, classes
    if kind == "text":
        wanted, unwanted, given = "prompts", classes, prompts
    if given is None or unwanted is not None:
        raise InputError(f"{checkpoint.path} takes {wanted}; pass {wanted}=[…] only")
    if not (words := texts(given)):
        raise InputError(f"{wanted} is empty; pass at least one")
    line = flags_of({"ckpt": checkpoint.path, "dtype": dtype_of(checkpoint.model), **settings})
    if kind == "text":
        source = PromptList(words)
        config = parse_flags(TextGenerateConfig, [*line, "--prompts="]).resolve(source)
        return config, functools.partial(Prompts, source=source, load=load_encoder)
    config = parse_flags(GenerateConfig, line).resolve()
    words = classes.split(",") if isinstance(classes, str) else words  # as on the command line
    return dataclasses.replace(config, classes=words, num_fid_samples=len(words)), ClassLabels


def texts(values):
    """One value, or several (list, array or tensor), as a list of strings."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [str(value) for value in ([values] if isinstance(values, str | int) else values)]


def flags_of(settings):
    """{name: value} as a command line: {"heun": True, "shift": 2.0, "vae": None} → --heun --shift=2.0."""
    given = {name: value for name, value in settings.items() if value is not None}
    return [
        shown(name if value else f"no-{name}") if isinstance(value, bool) else f"{shown(name)}={value}"
        for name, value in given.items()
    ]


def dtype_of(model):
    """Name of a model's precision. Raises InputError for one that is not in DTYPES."""
    found = [name for name, dtype in DTYPES.items() if dtype == model.pos_embed.dtype]
    if not found:
        raise InputError(f"the model is in {model.pos_embed.dtype}; convert it with model.float()")
    return found[0]


@contextlib.contextmanager
def naming_keywords():
    """Replace flags in the messages of InputErrors by the keywords of `sample`: --num-steps → steps."""
    try:
        yield
    except InputError as error:

        def keyword(flag):
            name = flag[1].replace("-", "_")
            return KEYWORDS.get(name, name)

        raise InputError(re.sub(r"(?<![\w.-])--([a-z][\w-]*)", keyword, str(error))) from None

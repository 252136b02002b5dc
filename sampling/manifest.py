"""What samples are made of: the manifest beside them, and the settings of the folder that they are made in."""

import dataclasses
import json
import platform
import typing
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError
from common.files import read_json

SETTINGS = "settings.json"


# What decides no pixel, or only its rounding. A checkpoint may be moved: its weights decide.
FREE = ("ckpt", "num_fid_samples", "per_proc_batch_size", "decode_batch_size", "compile", "format", "versions")
OF_PROMPTS = ("prompts", "images_per_prompt", "text_encoder", "text")


@dataclasses.dataclass
class SampleManifest:
    """The JSON beside a result. None: not known, in files of older versions and of other programs.

    The same command gives the same manifest. OF_PROMPTS are written for prompts only.
    """

    ckpt: str | None = None
    weights: str | None = None  # ema or raw
    model: str | None = None  # preset
    fused_attn: bool | None = None
    path_type: str | None = None
    vae: str | None = None
    mode: str | None = None
    num_steps: int | None = None
    shift: float | None = None
    heun: bool | None = None
    cfg_scale: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None
    global_seed: int | None = None
    labels: list | None = None  # class or prompt of each image
    dtype: str | None = None
    vae_dtype: str | None = None
    tf32: bool | None = None
    compile: bool | None = None
    per_proc_batch_size: int | None = None
    decode_batch_size: int | None = None
    num_fid_samples: int | None = None
    format: str | None = None
    decode: bool | None = None
    label_mode: str | None = None  # --labels, or "prompts"
    labels_sha256: str | None = None  # of the file that they are from
    model_options: dict | None = None  # constructor arguments
    latents: dict | None = None  # LatentSpec
    run: str | None = None
    step: int | None = None
    weights_sha256: str | None = None
    model_evaluations: int | None = None  # of an image
    forward_passes: int | None = None  # of a batch
    guided_passes: int | None = None  # those of 2N rows
    versions: dict | None = None

    prompts: list | None = None  # the words of --prompts
    images_per_prompt: int | None = None
    text_encoder: str | None = None  # --text-encoder
    text: dict | None = None  # TextSpec

    def to_json(self):
        """The content of the file."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists, as in the file
        return {name: value for name, value in content.items() if self.text or name not in OF_PROMPTS}

    def settings(self, kept_as):
        """What decides the images and how unfinished work is kept (a store's `kind`), flags first."""
        settings = {name: value for name, value in self.to_json().items() if name not in (*FREE, "label_mode")}
        return {**settings, "labels": self.label_mode, "kept_as": kept_as}


def build_manifest(sampler):
    """SampleManifest of what an ImageSampler makes as its configuration says."""
    config, checkpoint, cost = sampler.config, sampler.checkpoint, sampler.cost
    known = {field.name for field in dataclasses.fields(SampleManifest)}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name in known}
    values.update(
        model=checkpoint.run.get("model") or config.model,
        path_type=sampler.path.name,
        vae=sampler.spec.vae,
        **sampler.condition.facts(config.num_fid_samples),
        model_options=checkpoint.options,
        latents=dataclasses.asdict(sampler.spec),
        run=checkpoint.run.get("exp_name"),
        step=checkpoint.steps,
        weights_sha256=sampler.weights_sha256,
        model_evaluations=cost.evaluations,
        forward_passes=cost.calls,
        guided_passes=cost.guided,
        versions={"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    )
    return SampleManifest(**values)


def read_manifest(path):
    """SampleManifest in a file; keys that it does not know are left out. Raises InputError naming file and key."""
    content, types = read_object(path), typing.get_type_hints(SampleManifest)
    for name in content.keys() & types.keys():
        wanted = types[name] | int if types[name] == float | None else types[name]
        if not isinstance(content[name], wanted):
            raise InputError(f"{path}: '{name}' is {content[name]!r:.60}, not {wanted}; make the samples again")
    return SampleManifest(**{name: value for name, value in content.items() if name in types})


def manifest_path(samples):
    """The manifest of an npz, a picture or a folder of samples."""
    samples = Path(samples)
    return samples.with_suffix(".json") if samples.suffix in (".npz", ".png") else Path(f"{samples}.json")


def check_settings(folder, settings):
    """Raise InputError where a folder holds images of other settings."""
    found = read_object(folder / SETTINGS)
    changed = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
    if changed:
        key = changed[0]
        raise InputError(
            f"{folder} holds images made with another {key} ({found.get(key)}, now {settings.get(key)}); "
            "delete the folder or pass another --sample-dir"
        )


def read_object(path):
    """The JSON object in a file. Raises InputError naming it."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; delete it and make the samples again")
    return content

"""What samples are made of: the manifest beside them, and the settings of the folder that they are made in."""

import dataclasses
import json
from pathlib import Path

from common.errors import InputError
from common.flags import shown
from common.records import check_record, read_record
from common.versions import versions
from latents.manifest import AGAIN, ENCODERS
from models.specs import TRAINING
from sampling.flags import BRANCH_FLAGS, GenerateConfig, TextGenerateConfig

SETTINGS = "settings.json"
SEALED = "sealed"  # entry: whether all files have seals; those of earlier versions do not
# What decides no pixel, or only its rounding. A checkpoint may be moved: its weights decide.
FREE = ("ckpt", "training", "num_fid_samples", "per_proc_batch_size", "decode_batch_size", "compile", "format")
FREE += ("versions", "npz_sha256")
FLAGS = [field.name for cls in (GenerateConfig, TextGenerateConfig) for field in dataclasses.fields(cls)]
FLAGS += ["ref", "features", "inception_weights", "metric"]  # of sweep and watch
SHOWN = {  # names of settings in messages; others as in the file
    **{name: shown(name) for name in FLAGS},
    "num_samples": "--num-fid-samples",
    "kept_as": "--format",
    "labels_sha256": "SHA-256 of the --labels or --prompts file",
    "weights_sha256": "SHA-256 of the weights in --ckpt",
}
KEPT_AS = {"png": "png or both", "geneval": "png or both", "parts": "npz"}  # {a store's kind: --format}
OF_PROMPTS = ("prompts", "images_per_prompt", "text_encoder", "text")


@dataclasses.dataclass
class SampleManifest:
    """The JSON beside a result. None: not known, in files of older versions and of other programs.

    The same command gives the same manifest. OF_PROMPTS are written only for prompts, BRANCH_FLAGS only if set.
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
    ig_scale: float | None = None
    ig_branch: int | None = None
    ig_low: float | None = None
    ig_high: float | None = None
    cfg_exit: int | None = None
    exit_branch: int | None = None
    exit_schedule: str | None = None
    branch_gap: float | str | None = None
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
    training: dict | None = None  # what of the run's configuration bears on its numbers
    step: int | None = None
    weights_sha256: str | None = None
    model_evaluations: int | float | None = None  # per image; partial passes count as fractions
    forward_passes: int | None = None  # of a batch
    guided_passes: int | None = None  # those of 2N rows
    versions: dict | None = None
    npz_sha256: str | None = None  # of the npz beside it

    prompts: list | None = None  # the words of --prompts
    images_per_prompt: int | None = None
    text_encoder: str | None = None  # --text-encoder
    text: dict | None = None  # TextSpec

    def to_json(self):
        """The content of the file."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists, as in the file
        left_out = {*(() if self.text else OF_PROMPTS), *BRANCH_FLAGS} - self.branch_settings().keys()
        return {name: value for name, value in content.items() if name not in left_out}

    def branch_settings(self):
        """{field: value} of the BRANCH_FLAGS that are set."""
        return {name: value for name in BRANCH_FLAGS if (value := getattr(self, name)) is not None}

    def settings(self, kept_as):
        """What decides the images and how unfinished work is kept (a store's `kind`), flags first."""
        settings = {name: value for name, value in self.to_json().items() if name not in (*FREE, "label_mode")}
        return {**settings, "labels": self.label_mode, "kept_as": kept_as}


def build_manifest(sampler):
    """SampleManifest of what an ImageSampler makes as its configuration says."""
    import torch  # readers of manifests need none

    config, checkpoint, cost = sampler.config, sampler.checkpoint, sampler.cost
    flags = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(SampleManifest)}
    found = {
        "model": checkpoint.run.get("model") or config.model,
        "path_type": sampler.path.name,
        "vae": sampler.spec.vae,
        **dict.fromkeys(BRANCH_FLAGS),
        **config.branch_settings(),
        **sampler.condition.facts(),
        "model_options": checkpoint.options,
        "latents": dataclasses.asdict(sampler.spec),
        "run": checkpoint.run.get("exp_name"),
        "training": {name: checkpoint.run[name] for name in TRAINING if name in checkpoint.run} or None,
        "step": checkpoint.steps,
        "weights_sha256": sampler.weights_sha256,
        "model_evaluations": cost.evaluations,
        "forward_passes": cost.calls,
        "guided_passes": cost.guided_calls,
        "versions": {**versions(), "torch": torch.__version__},
    }
    return SampleManifest(**{**flags, **found})


def read_manifest(path, remedy="make the samples again"):
    """SampleManifest in a file; keys that it does not know are left out. Raises InputError naming file and key."""
    return read_record(SampleManifest, path, remedy)


def manifest_path(samples):
    """The manifest of an npz, a picture or a folder of samples."""
    samples = Path(samples)
    return samples.with_suffix(".json") if samples.suffix in (".npz", ".png") else Path(f"{samples}.json")


def check_settings(folder, settings, name=SETTINGS, remedy="delete the folder or pass another --sample-dir"):
    """Settings in the file `name` of a folder. Raises InputError if its images were made with others."""
    found = read_record(dict, folder / name, remedy)
    if key := changed_setting(found, settings, folder / name):
        old, new = found.get(key), settings.get(key)
        if key == "kept_as":
            old, new = KEPT_AS.get(old, str(old)), KEPT_AS[new]
            remedy = f"pass --format {old.split()[-1]}, or another --sample-dir"
        change = f"{SHOWN.get(key, key)} was {old}, is now {new}"
        raise InputError(f"{folder} holds images made with other settings: {change}; {remedy}")
    return found


def changed_setting(found, settings, path):
    """The first key at which settings differ from those `found` in the file `path`, else None.

    VAE, text encoder and files of labels or prompts are compared by content, not by name.
    """
    sha256 = settings.get("labels_sha256")
    names = ("labels", "prompts") if sha256 and sha256 == found.get("labels_sha256") else ()  # the file may have moved
    for key in {**settings, **found}:
        old, new = found.get(key), settings.get(key)
        if key in ENCODERS and old and new:
            old, new = (check_record(ENCODERS[key], spec, f"{path}, {key}", AGAIN) for spec in (old, new))
            if old.difference(new) or (key == "latents" and old.difference(new, "decoder_sha256", "vae")):
                return key
        elif old != new and key not in (SEALED, "vae", "text_encoder", *names):
            return key
    return None

"""Write a checkpoint's model as a folder that others can load without this repository's checkpoints.

    python -m models.export exps/xl/checkpoints/2000000.pt deepflow-xl [--weights raw] [--half] [--diffusers]

DIR/model.safetensors holds the weights, DIR/config.json the constructor's arguments, the path, and the VAE and classes
of the training data, and DIR/README.md is a model card. `load_model(DIR)`, `generate.py --ckpt DIR` and
`DeepFlow.from_pretrained(DIR)` (for a flow map, `FlowMap.from_pretrained(DIR)`) need nothing else.
"""

import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import whole_folder, write_json
from common.flags import flag, parse_early, parse_flags, required
from models.flags import PublishedFlags


@dataclasses.dataclass(kw_only=True)
class ExportFlags(PublishedFlags):
    ckpt: str = required("checkpoint of ours, or a published file", positional=True)
    dir: str = required("folder to write, which must not exist", positional=True)
    weights: str = flag("ema", "which weights of the file", choices=["ema", "raw"], group="model")
    half: bool = flag(False, "store the weights in float16; they are converted to float32 on reading", group="output")
    diffusers: bool = flag(False, "also write the VAE and what DiffusionPipeline.from_pretrained needs", group="output")
    vae: str | None = flag(None, "with --diffusers: name or folder of the VAE, if it has moved", str, group="output")


if __name__ == "__main__":
    parse_early(ExportFlags, __doc__)

from safetensors.torch import save_file

from models.card import model_card
from models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint
from models.codec import LatentCodec
from models.hub import VAE_FOLDER, is_on_hub
from models.specs import PLACES, TRAINING, LatentSpec

# What sampling and its manifest need; paths of the training machine are left out.
PATHS = (*PLACES, "enc_ckpt")
RUN_KEYS = ("model", "exp_name", "path_type", *TRAINING)
CODE = '''"""Runs the code of the DeepFlow repository, which must be installed; README.md says how."""

import importlib  # diffusers would take an import statement for the name of a package to install

try:
    {name} = importlib.import_module("sampling.pipeline").{name}
except ModuleNotFoundError as error:
    remedy = "run pip install -r requirements.txt in a checkout of the DeepFlow repository"
    raise ImportError(f"{name} needs the code of DeepFlow ({{error}}); {{remedy}}") from error
'''


def export(path, folder, weights="ema", half=False, diffusers=False, vae=None, **overrides):
    """Write the model of checkpoint `path` to `folder`, complete or not at all; returns its kind. Raises InputError.

    weights: "ema" or "raw"; half: store them in float16; diffusers: also write a pipeline; vae: name or folder of its
    VAE, if not as in the checkpoint; overrides: as in load_checkpoint.
    """
    if Path(folder).exists():
        raise InputError(f"{folder} exists already; name a new folder")
    with whole_folder(folder, "folder") as partial:
        checkpoint = load_checkpoint(path, weights, **overrides)
        places = {key: place for key in PLACES if (place := checkpoint.run.get(key)) and not is_on_hub(place)}
        checkpoint.run |= {key: Path(place).name for key, place in places.items()}
        for entry in checkpoint.run.get("changes", ()):
            entry["changes"] = {flag: values for flag, values in entry["changes"].items() if flag not in PATHS}
        run = {key: checkpoint.run[key] for key in RUN_KEYS if key in checkpoint.run}
        data = {**checkpoint.data, **(write_pipeline(partial, checkpoint, vae) if diffusers else {})}
        about = {"run": run, "data": data, "steps": checkpoint.steps, "weights": weights}
        # safetensors rejects tensors that share memory, as those of a published file may
        tensors = (checkpoint.model.half() if half else checkpoint.model).state_dict()
        state = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, {**checkpoint.options, **about})
        card = model_card(checkpoint, Path(folder).name, weights, diffusers)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return checkpoint.model.kind


def write_pipeline(folder, checkpoint, vae):
    """Write the VAE, code and index of a diffusers pipeline; returns the VAE's hashes. Raises InputError."""
    import diffusers

    spec = checkpoint.data_as(LatentSpec)
    codec = LatentCodec.load(vae or spec.vae).fit(spec, checkpoint.path)
    codec.vae.save_pretrained(folder / VAE_FOLDER)
    index = {
        "_class_name": ["pipeline", "DeepFlowPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": ["deepflow_transformer", "DeepFlowTransformer"],  # diffusers looks for code in its own folder
        VAE_FOLDER: ["diffusers", "AutoencoderKL"],
    }
    for place, (module, name) in ((".", index["_class_name"]), ("transformer", index["transformer"])):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / f"{module}.py").write_text(CODE.format(name=name))
    write_json(folder / "model_index.json", index)
    return {name: getattr(codec.spec, name) for name in ("encoder_sha256", "decoder_sha256")}


def main(argv=None):
    flags = parse_flags(ExportFlags, argv, __doc__)
    if flags.vae and not flags.diffusers:
        raise InputError("--vae belongs to --diffusers, which copies the VAE; pass both, or leave --vae out")
    kind = export(flags.ckpt, flags.dir, flags.weights, flags.half, flags.diffusers, flags.vae, **flags.published())
    print(f"{flags.ckpt} ({flags.weights} weights) -> {flags.dir}")
    program = "generate_t2i.py --prompts 'a dog'" if kind == "text" else "generate.py"
    print(f"next: python {program} --ckpt {flags.dir}{' --weights raw' * (flags.weights == 'raw')}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

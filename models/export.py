"""Write a checkpoint's model as a folder that others can load without this repository's checkpoints.

    python -m models.export exps/xl/checkpoints/2000000.pt deepflow-xl [--weights raw]

DIR/model.safetensors holds the weights, DIR/config.json the constructor's arguments, the path, and the VAE and classes
of the training data. `load_model(DIR)`, `generate.py --ckpt DIR` and `DeepFlow.from_pretrained(DIR)` (for a flow map,
`FlowMap.from_pretrained(DIR)`) need nothing else.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from common.errors import InputError, exit_on_input_error
from common.files import write_json
from common.flags import flag, parse_flags, required
from models.checkpoints import CONFIG_FILE, TRAINING, WEIGHTS_FILE, load_checkpoint

# What sampling and its manifest need; paths of the training machine are left out.
RUN_KEYS = ("model", "exp_name", "path_type", *TRAINING)


def export(path, folder, weights="ema", **overrides):
    """Write the model of checkpoint `path` to `folder`, complete or not at all. Raises InputError.

    weights: "ema" or "raw"; overrides: constructor arguments that a published file does not determine.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder")
    checkpoint = load_checkpoint(path, weights, **overrides)
    run = {key: checkpoint.run[key] for key in RUN_KEYS if key in checkpoint.run}
    about = {"run": run, "data": checkpoint.data, "steps": checkpoint.steps, "weights": weights}
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        state = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, {**checkpoint.options, **about})
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: {getattr(error, 'strerror', None) or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass
class ExportFlags:
    """Flags of this program."""

    ckpt: str = required("checkpoint of ours, or a published file", positional=True)
    dir: str = required("folder to write, which must not exist", positional=True)
    weights: str = flag("ema", "which weights of the file", choices=["ema", "raw"])
    df_idxs: list | None = flag(None, "key layers of a published file, as in generate.py", str, nargs="+")
    dmf_depth: int | None = flag(None, "number of blocks that see t, for a published flow map", int)
    legacy_scaling: bool | None = flag(None, "for a published file that clamps the time-gap scale", bool)


def main(argv=None):
    flags = parse_flags(ExportFlags, argv, __doc__)
    options = {name: getattr(flags, name) for name in ("df_idxs", "dmf_depth", "legacy_scaling")}
    export(flags.ckpt, flags.dir, flags.weights, **options)
    print(f"{flags.ckpt} ({flags.weights} weights) -> {flags.dir}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

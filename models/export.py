"""Write a checkpoint's model as a folder that others can load without this repository's checkpoints.

    python -m models.export exps/xl/checkpoints/2000000.pt deepflow-xl [--weights raw]

DIR/model.safetensors holds the weights, DIR/config.json the constructor's arguments, the path, and the VAE and classes
of the training data: no more is needed by `load_model(DIR)`, `generate.py --ckpt DIR`, `DeepFlow.from_pretrained(DIR)`
and, of a flow map, `FlowMap.from_pretrained(DIR)`.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from common.errors import InputError, exit_on_input_error
from models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint

RUN_KEYS = ("model", "exp_name", "path_type")  # what sampling needs; folders of the training machine stay there


def folder_config(checkpoint, weights):
    """Content of config.json: the constructor's arguments, and beside them what the checkpoint says of the run."""
    run = {key: checkpoint.run[key] for key in RUN_KEYS if key in checkpoint.run}
    facts = {"run": run, "data": checkpoint.data, "steps": checkpoint.steps, "weights": weights}
    return {**checkpoint.options, **facts}


def export(path, folder, weights="ema", **overrides):
    """Write the model of checkpoint `path` to `folder`, complete or absent. Raises InputError.

    weights: "ema" or "raw"; overrides: constructor arguments that a published file cannot tell.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder")
    checkpoint = load_checkpoint(path, weights, **overrides)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        state = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(folder_config(checkpoint, weights), indent=1) + "\n")
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: {getattr(error, 'strerror', None) or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__.splitlines()[0])
    parser.add_argument("ckpt", help="checkpoint of ours, or a published file")
    parser.add_argument("dir", help="folder to make")
    parser.add_argument("--weights", default="ema", choices=["ema", "raw"], help="which weights of the file")
    parser.add_argument("--df-idxs", nargs="+", help="key layers of a published file, as for generate.py")
    parser.add_argument("--dmf-depth", type=int, help="of a published flow map: number of blocks that see t")
    parser.add_argument(
        "--legacy-scaling", action=argparse.BooleanOptionalAction, help="the published file clamps the time-gap scale"
    )
    args = parser.parse_args(argv)
    flags = {"df_idxs": args.df_idxs, "legacy_scaling": args.legacy_scaling, "dmf_depth": args.dmf_depth}
    export(args.ckpt, args.dir, args.weights, **flags)
    print(f"{args.ckpt} ({args.weights} weights) -> {args.dir}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

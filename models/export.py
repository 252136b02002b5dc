"""Write a checkpoint's model as a folder that others can load without this repository's checkpoints.

    python -m models.export exps/xl/checkpoints/2000000.pt deepflow-xl [--weights raw]

DIR/model.safetensors holds the weights, DIR/config.json the constructor's arguments, the path, and the VAE and classes
of the training data. `load_model(DIR)`, `generate.py --ckpt DIR` and `DeepFlow.from_pretrained(DIR)` (for a flow map,
`FlowMap.from_pretrained(DIR)`) need nothing else.
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
    weights: str = flag("ema", "which weights of the file", choices=["ema", "raw"])


if __name__ == "__main__":
    parse_early(ExportFlags, __doc__)

from safetensors.torch import save_file

from models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint
from models.specs import TRAINING

# What sampling and its manifest need; paths of the training machine are left out.
RUN_KEYS = ("model", "exp_name", "path_type", *TRAINING)


def export(path, folder, weights="ema", **overrides):
    """Write the model of checkpoint `path` to `folder`, complete or not at all. Raises InputError.

    weights: "ema" or "raw"; overrides: as in load_checkpoint.
    """
    if Path(folder).exists():
        raise InputError(f"{folder} exists already; name a new folder")
    with whole_folder(folder, "folder") as partial:
        checkpoint = load_checkpoint(path, weights, **overrides)
        run = {key: checkpoint.run[key] for key in RUN_KEYS if key in checkpoint.run}
        about = {"run": run, "data": checkpoint.data, "steps": checkpoint.steps, "weights": weights}
        # safetensors rejects tensors that share memory, as those of a published file may
        state = {name: tensor.contiguous().clone() for name, tensor in checkpoint.model.state_dict().items()}
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, {**checkpoint.options, **about})


def main(argv=None):
    flags = parse_flags(ExportFlags, argv, __doc__)
    export(flags.ckpt, flags.dir, flags.weights, **flags.published())
    print(f"{flags.ckpt} ({flags.weights} weights) -> {flags.dir}")
    print(f"next: python generate.py --ckpt {flags.dir}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

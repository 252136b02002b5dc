"""From images to what training reads: convert, encode, pack, verify. docs/data.md explains the layouts.

    python preprocessing/dataset_tools.py convert --source ILSVRC/Data/CLS-LOC/train --dest DATA/images \\
        --resolution 256x256 --transform center-crop-dhariwal
    torchrun --nproc_per_node 8 preprocessing/dataset_tools.py encode --source DATA/images --dest DATA/vae-sd

Every command can be killed and run again: it resumes where it was, and does nothing once everything is there.
"""

import os
import pkgutil
from pathlib import Path

from common.errors import InputError, exit_on_input_error, note
from common.files import locked, naming
from common.flags import parse_commands
from latents.manifest import IMAGES, MOMENTS, TEXT
from preprocessing import options as flags

COMMANDS = {  # flags, and the function, imported when it is needed
    "convert": (flags.ConvertFlags, "preprocessing.convert:convert"),
    "encode": (flags.EncodeFlags, "preprocessing.encode:encode"),
    "mirror": (flags.MirrorFlags, "preprocessing.encode:encode"),
    "features": (flags.FeatureFlags, "preprocessing.encode:write_features"),
    "captions": (flags.CaptionFlags, "preprocessing.text:write_captions"),
    "pack": (flags.PackFlags, "preprocessing.pack:pack"),
    "verify": (flags.VerifyFlags, "preprocessing.verify:run"),
    "info": (flags.InfoFlags, "preprocessing.info:run"),
}
TOOLS = "python -m preprocessing.dataset_tools"
NEXT = {  # the next command to run; data: the data folder, or the set itself if it lies in none
    "convert": f"{TOOLS} encode --source {{dest}} --dest {{dest.parent}}/vae-sd",
    "encode": "python train.py --data-dir {data}",
    "mirror": "python train.py --data-dir {data} --mirror",
    "features": "python train.py --data-dir {data} --ssl-align --enc-type {options.enc_type}",
    "captions": "python train_t2i.py --data-dir {data}",
    "pack": "python {train} --data-dir {dest}",
    "verify": "python {train} --data-dir {data}",
    "info": "python {train} --data-dir {data}",
}


def next_command(name, options):
    """The command to run after the command `name`."""
    dest = Path(getattr(options, "dest", None) or options.data_dir)
    data = dest.parent if (dest.parent / MOMENTS).is_dir() else dest
    images = data if data.name == IMAGES else data / IMAGES
    if name in ("info", "verify") and images.is_dir() and not (data / MOMENTS).is_dir():
        name, dest = "convert", images
    train = "train_t2i.py" if (data / TEXT).is_dir() else "train.py"
    return NEXT[name].format(dest=dest, data=data, train=train, options=options)


def main(arguments=None):
    name, options = parse_commands({name: cls for name, (cls, _) in COMMANDS.items()}, arguments, __doc__)
    if name in ("convert", "pack") and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{name} must be started without torchrun; --num-workers makes it faster")
    dest = getattr(options, "dest", None)
    writes = dest is not None and os.environ.get("RANK", "0") == "0"
    with locked(dest or ".", "--dest", writes), naming(dest or "the disk"):
        pkgutil.resolve_name(COMMANDS[name][1])(options)
    note(f"next: {next_command(name, options)}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

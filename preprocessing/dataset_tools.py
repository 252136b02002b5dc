"""From images to what training reads: convert, encode, pack, verify. docs/data.md explains the layouts.

    python preprocessing/dataset_tools.py convert --source ILSVRC/Data/CLS-LOC/train --dest DATA/images \\
        --resolution 256x256 --transform center-crop-dhariwal
    torchrun --nproc_per_node 8 preprocessing/dataset_tools.py encode --source DATA/images --dest DATA/vae-sd

Every command can be killed and run again: it resumes where it was, and does nothing once everything is there.
"""

import dataclasses
import os
import sys

from common.errors import exit_on_input_error
from common.files import locked, naming
from common.flags import flag, parse_commands, required
from preprocessing.convert import ConvertFlags, convert
from preprocessing.encode import EncodeFlags, FeatureFlags, MirrorFlags, encode, write_features
from preprocessing.info import describe, write_grid
from preprocessing.pack import PackFlags, pack
from preprocessing.text import CaptionFlags, write_captions
from preprocessing.verify import verify


@dataclasses.dataclass
class VerifyFlags:
    """is everything there and right? Prints the first fault of each kind; exit code 1 if there is any"""

    data_dir: str = required("data folder, or one set of it", metavar="DIR", positional=True)
    vae: str | None = flag(None, "compare with this VAE, and encode 64 of the images again", str)
    decode: bool = flag(False, "read every image whole, not only its header")


@dataclasses.dataclass
class InfoFlags:
    """what the manifest says, in ten lines"""

    data_dir: str = required("data folder, or one set of it", metavar="DIR", positional=True)
    grid: str | None = flag(None, "also decode 64 latents into this picture", str, metavar="PNG")
    vae: str | None = flag(None, "VAE of the picture; default: the recorded one", str)


def run_verify(options):
    """verify: print faults and end with exit code 1 if there are any."""
    report = verify(options.data_dir, options.vae, options.decode)
    print("\n".join(report.lines() or [f"{options.data_dir}: no fault found"]))
    if report.faults:
        sys.exit(1)


def run_info(options):
    """info: print the lines, write the picture."""
    print("\n".join(describe(options.data_dir)))
    if options.grid:
        write_grid(options.data_dir, options.grid, options.vae)


COMMANDS = {
    "convert": (ConvertFlags, convert),
    "encode": (EncodeFlags, encode),
    "mirror": (MirrorFlags, encode),
    "features": (FeatureFlags, write_features),
    "captions": (CaptionFlags, write_captions),
    "pack": (PackFlags, pack),
    "verify": (VerifyFlags, run_verify),
    "info": (InfoFlags, run_info),
}


def main(arguments=None):
    name, options = parse_commands({name: cls for name, (cls, _) in COMMANDS.items()}, arguments, __doc__)
    dest = getattr(options, "dest", None)
    writes = dest is not None and os.environ.get("RANK", "0") == "0"
    with locked(dest or ".", "--dest", writes), naming(dest or "the disk"):
        COMMANDS[name][1](options)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

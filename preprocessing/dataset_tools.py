"""From images to what training reads: convert, encode, pack, verify. docs/data.md explains the layouts.

    python preprocessing/dataset_tools.py convert --source ILSVRC/Data/CLS-LOC/train --dest DATA/images \\
        --resolution 256x256 --transform center-crop-dhariwal
    torchrun --nproc_per_node 8 preprocessing/dataset_tools.py encode --source DATA/images --dest DATA/vae-sd

Every command can be killed and run again: it goes on where it was, and does nothing once everything is there.
"""

import argparse
import errno
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.errors import InputError, exit_on_input_error
from models.codec import DEFAULT_VAE
from models.encoders import ENCODERS
from models.text import DEFAULT_TEXT_ENCODER
from preprocessing.convert import FORMATS, convert
from preprocessing.encode import DTYPES, STORED, encode, write_features
from preprocessing.info import describe, write_grid
from preprocessing.pack import pack
from preprocessing.packed import SHARD_SIZE
from preprocessing.text import write_captions
from preprocessing.transforms import TRANSFORMS
from preprocessing.verify import verify


def resolution(text):
    """'256x256' or '256,256' → (256, 256)."""
    match = re.fullmatch(r"(\d+)[x,](\d+)", text)
    if not match or 0 in (size := tuple(map(int, match.groups()))):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for example 256x256")
    return size


def positive(text):
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def usable_cores():
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def add_source(parser, what):
    """Flags that say which images to read."""
    parser.add_argument("--source", required=True, metavar="DIR|ZIP", help=what)
    parser.add_argument("--max-images", type=positive, metavar="N", help="take only the first N in order")
    parser.add_argument("--skip-bad", action="store_true", help="list and leave out unreadable images, do not stop")
    parser.add_argument(
        "--published-labels",
        action="store_true",
        help="number classes as the published tool does: a file in the root is a class that shifts all others",
    )


def add_convert(commands):
    """The convert command's flags."""
    parser = commands.add_parser("convert", help="images of any size → square RGB images of one size")
    add_source(parser, "folder of class folders, or a zip of them; labels by sorted top folder, or by its dataset.json")
    parser.add_argument("--dest", required=True, metavar="DIR|ZIP", help="empty or new folder, or a .zip to make")
    parser.add_argument("--resolution", type=resolution, metavar="WxH", help="for example 256x256")
    parser.add_argument("--transform", choices=sorted(TRANSFORMS), help="default: resize without a crop")
    parser.add_argument("--format", choices=sorted(FORMATS), default="png", help="default png; jpeg loses detail")
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="processes (default: all cores)")
    parser.set_defaults(
        run=lambda a: convert(
            a.source,
            a.dest,
            a.resolution,
            a.transform,
            a.max_images,
            a.workers,
            a.format,
            a.published_labels,
            a.skip_bad,
        )
    )


def add_encode(commands):
    """The flags of encode and of mirror, which is encode of flipped images."""
    for name, text in (
        ("encode", "converted images → moments (mean and std) of a VAE; also under torchrun"),
        ("mirror", "encode the horizontally flipped images, as a second set beside the first (DATA/vae-sd-mirror)"),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        add_source(parser, "what convert made (DATA/images)")
        parser.add_argument("--dest", required=True, metavar="DIR", help="empty or new folder (DATA/vae-sd)")
        parser.add_argument("--vae", "--model-url", default=DEFAULT_VAE, help=f"name or folder (default {DEFAULT_VAE})")
        parser.add_argument("--batch-size", type=positive, default=16, help="images at once per process (default 16)")
        parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the VAE's arithmetic")
        parser.add_argument("--packed", action="store_true", help="write memory-mapped shards, not a file per image")
        add_stored(parser)
        parser.add_argument("--workers", type=positive, default=4, help="threads that read images (default 4)")
        parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
        parser.set_defaults(
            run=lambda a, flip=name == "mirror": encode(
                a.source,
                a.dest,
                a.vae,
                batch_size=a.batch_size,
                dtype=a.dtype,
                packed=a.packed,
                stored=a.stored_dtype,
                flip=flip,
                shard_size=a.shard_size,
                max_images=a.max_images,
                workers=a.workers,
                skip_bad=a.skip_bad,
                published_labels=a.published_labels,
                device=a.device,
            )
        )


def add_stored(parser):
    """Flags of everything that writes shards."""
    parser.add_argument("--stored-dtype", choices=sorted(STORED), default="fp16", help="of packed rows")
    parser.add_argument("--shard-size", type=positive, default=SHARD_SIZE, help=f"default {SHARD_SIZE} rows")


def add_features(commands):
    """The features command's flags."""
    text = "patch features of an alignment encoder as a packed set, so that training needs no encoder"
    parser = commands.add_parser("features", help=text, description=text)
    add_source(parser, "what convert made (DATA/images)")
    parser.add_argument("--dest", required=True, metavar="DIR", help="empty or new folder (DATA/features-NAME)")
    parser.add_argument("--enc-type", required=True, metavar="NAME", help="one of " + ", ".join(ENCODERS))
    parser.add_argument(
        "--enc-ckpt", metavar="FILE", help="its weights, the authors' file or timm's (default: the hub's)"
    )
    parser.add_argument("--mirror", action="store_true", help="of the flipped images (DATA/features-NAME-mirror)")
    parser.add_argument("--batch-size", type=positive, default=16, help="images at once per process (default 16)")
    add_stored(parser)
    parser.add_argument("--workers", type=positive, default=4, help="threads that read images (default 4)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.set_defaults(
        run=lambda a: write_features(
            a.source,
            a.dest,
            a.enc_type,
            a.enc_ckpt,
            batch_size=a.batch_size,
            stored=a.stored_dtype,
            flip=a.mirror,
            shard_size=a.shard_size,
            max_images=a.max_images,
            workers=a.workers,
            skip_bad=a.skip_bad,
            published_labels=a.published_labels,
            device=a.device,
        )
    )


def add_captions(commands):
    """The captions command's flags."""
    text = "captions of the images → features of a text encoder, as a packed set with the captions beside it"
    parser = commands.add_parser("captions", help=text, description=text)
    parser.add_argument("--source", required=True, metavar="DIR|ZIP", help="what convert made (DATA/images)")
    parser.add_argument(
        "--annotations", required=True, metavar="JSON", help="COCO's captions, or {file name: [captions]}"
    )
    parser.add_argument("--dest", required=True, metavar="DIR", help="empty or new folder (DATA/text)")
    parser.add_argument(
        "--text-encoder", default=DEFAULT_TEXT_ENCODER, help=f"name or folder (default {DEFAULT_TEXT_ENCODER})"
    )
    parser.add_argument("--max-images", type=positive, metavar="N", help="take only the first N in order")
    parser.add_argument("--batch-size", type=positive, default=64, help="captions at once per process (default 64)")
    add_stored(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.set_defaults(
        run=lambda a: write_captions(
            a.source,
            a.annotations,
            a.dest,
            a.text_encoder,
            batch_size=a.batch_size,
            stored=a.stored_dtype,
            shard_size=a.shard_size,
            max_images=a.max_images,
            device=a.device,
        )
    )


def add_pack(commands):
    """The pack command's flags."""
    text = "moments of either layout → memory-mapped shards with checksums"
    parser = commands.add_parser("pack", help=text, description=text)
    parser.add_argument("--source", required=True, metavar="DIR", help="data folder, or one set of it")
    parser.add_argument("--dest", required=True, metavar="DIR", help="empty or new folder of the same kind")
    parser.add_argument("--vae", help="the VAE of a source without a manifest")
    parser.add_argument("--num-classes", type=positive, help="classes of a source without a manifest")
    parser.add_argument("--workers", type=positive, default=8, help="threads that read files (default 8)")
    add_stored(parser)
    parser.set_defaults(
        run=lambda a: pack(a.source, a.dest, a.stored_dtype, a.shard_size, a.vae, a.num_classes, a.workers)
    )


def add_verify(commands):
    """The verify command's flags."""
    text = "is everything there and right? Prints the first fault of each kind; exit code 1 if there is any"
    parser = commands.add_parser("verify", help=text, description=text)
    parser.add_argument("data_dir", metavar="DIR", help="data folder, or one set of it")
    parser.add_argument("--vae", help="compare with this VAE, and encode a sample of the images again")
    parser.add_argument("--sample", type=positive, default=64, help="images to encode again (default 64)")
    parser.add_argument("--decode", action="store_true", help="read every image whole, not only its header")
    parser.set_defaults(run=run_verify)


def run_verify(options):
    """verify: print faults and end with exit code 1 if there are any."""
    report = verify(options.data_dir, options.vae, options.sample, options.decode)
    print("\n".join(report.lines() or [f"{options.data_dir}: no fault found"]))
    if report.faults:
        sys.exit(1)


def add_info(commands):
    """The info command's flags."""
    text = "what the manifest says, in ten lines"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("data_dir", metavar="DIR", help="data folder, or one set of it")
    parser.add_argument("--grid", metavar="PNG", help="also decode 64 latents into this picture")
    parser.add_argument("--vae", help="VAE of the picture (default: the recorded one)")
    parser.set_defaults(run=run_info)


def run_info(options):
    """info: print the lines, write the picture."""
    print("\n".join(describe(options.data_dir)))
    if options.grid:
        write_grid(options.data_dir, options.grid, options.vae)


def parse(arguments=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_convert(commands)
    add_encode(commands)
    add_features(commands)
    add_captions(commands)
    add_pack(commands)
    add_verify(commands)
    add_info(commands)
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run one command."""
    options = parse(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        options.run(options)
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}; choose a place you may write to") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        waiting = f"{tempfile.gettempdir()}, where lists of names wait (TMPDIR names another place)"
        raise InputError(f"the disk is full; free space at --dest or in {waiting}, and run again") from None


if __name__ == "__main__":
    with exit_on_input_error():
        main()

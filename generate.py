"""Sample images from a checkpoint, as PNG files and an npz for ADM-style evaluation.

    python generate.py --ckpt exps/first/checkpoints/0400000.pt --num-fid-samples 64
    python generate.py --ckpt exps/first --grid 8x8 --classes 207,robin --seed 0 --out grid.png
    torchrun --nproc-per-node 8 generate.py --ckpt CKPT --num-fid-samples 50000 --mode sde --num-steps 250

Writes exps/first/generated/first-0400000-sde-250-seed-0/000000.png …, and that name + .npz (`arr_0`, uint8 NHWC) and
.json (the manifest). Image i depends on (seed, i) alone, whatever the number of processes and the batch size. The same
command resumes an interrupted run.
"""

import dataclasses

from common.errors import exit_on_input_error, note
from common.files import naming
from common.flags import parse_early, parse_flags
from sampling.flags import GenerateConfig

if __name__ == "__main__":
    parse_early(GenerateConfig, __doc__)

from common.precision import set_math
from common.processes import Processes
from models.checkpoints import find_checkpoint
from models.compiling import keep_compiled
from sampling.conditions import ClassLabels
from sampling.results import default_folder, save_images, save_picture
from sampling.sampler import ImageSampler


def generate(config, make_condition=ClassLabels):
    """Make a picture, or many images, as a resolved configuration says; returns its path. Raises InputError."""
    if config.projector_embed_dims:
        note("--projector-embed-dims is unused: the checkpoint says what it holds")
    set_math(config.tf32, config.fused_attn)
    with Processes.join() as processes:
        # a run may write a newer checkpoint before the other processes look
        ckpt = processes.share("ckpt", str(find_checkpoint(config.ckpt, quiet=True)) if processes.is_main else None)
        config = dataclasses.replace(config, ckpt=ckpt, sample_dir=config.sample_dir or default_folder(ckpt))
        if config.compile:
            keep_compiled(config.sample_dir)
        with naming(config.out or config.sample_dir):
            save = save_picture if config.grid else save_images
            return save(ImageSampler(config, make_condition, processes.device), processes)


if __name__ == "__main__":
    with exit_on_input_error():
        generate(parse_flags(GenerateConfig, description=__doc__).resolve())

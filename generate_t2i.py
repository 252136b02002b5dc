"""Sample images of prompts from a text-to-image checkpoint; everything else is as in generate.py.

    python generate_t2i.py --ckpt CKPT --prompts "a cat on a sofa" "two red buses" --grid 2x4 --out cats.png
    torchrun --nproc-per-node 8 generate_t2i.py --ckpt CKPT --prompts captions_val2014.json --num-fid-samples 40192
    torchrun --nproc-per-node 8 generate_t2i.py --ckpt CKPT --prompts evaluation_metadata.jsonl --format png  # GenEval

The manifest's `labels` are the prompts of all images.
"""

import functools

from common.errors import exit_on_input_error
from common.flags import parse_early, parse_flags
from sampling.flags import TextGenerateConfig

if __name__ == "__main__":
    parse_early(TextGenerateConfig, __doc__)

from generate import generate
from sampling.conditions import Prompts, read_prompts


def generate_prompts(config):
    """Make a picture, or many images, of prompts; returns its path. Raises InputError."""
    source = read_prompts(config.prompts, config.global_seed)
    return generate(config.resolve(source), functools.partial(Prompts, source=source))


if __name__ == "__main__":
    with exit_on_input_error():
        generate_prompts(parse_flags(TextGenerateConfig, description=__doc__))

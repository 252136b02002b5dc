"""Sample images of prompts from a text-to-image checkpoint; everything else is as in generate.py.

    python generate_t2i.py --ckpt CKPT --prompts "a cat on a sofa" "two red buses" --grid 2x4 --out cats.png
    torchrun --nproc-per-node 8 generate_t2i.py --ckpt CKPT --prompts captions_val2014.json --num-fid-samples 40192
    torchrun --nproc-per-node 8 generate_t2i.py --ckpt CKPT --prompts evaluation_metadata.jsonl --format png  # GenEval

The manifest's `labels` are the prompts of all images.
"""

import dataclasses
import functools

from common.errors import InputError, exit_on_input_error
from common.flags import IMAGES, flag, parse_flags, required
from generate import generate
from sampling.conditions import Prompts, read_prompts
from sampling.flags import MODEL, OUTPUT, SAMPLING, SamplingFlags
from sampling.stores import GENEVAL_IMAGES

PROMPTS = (
    "prompts ('' is no text at all), or one file: text with a prompt per line, COCO's captions .json (one caption per "
    "image, drawn by the seed), GenEval's .jsonl (its folder layout is written)"
)


@dataclasses.dataclass(kw_only=True)
class TextGenerateConfig(SamplingFlags):
    """Flags of generate_t2i.py."""

    prompts: list = required(PROMPTS, str, nargs="+", group=SAMPLING, empty=True)
    images_per_prompt: int | None = flag(None, "default 1, for GenEval 4", int, range=IMAGES, group=SAMPLING)
    text_encoder: str | None = flag(None, "name or folder; default: the training data's", str, group=MODEL)
    cfg_scale: float = flag(2.0, "classifier-free guidance with the empty caption; 1.0 is none", group=SAMPLING)
    num_fid_samples: int | None = flag(None, "default: --images-per-prompt each", int, range=IMAGES, group=OUTPUT)

    def resolve(self, source):
        """As SamplingFlags.resolve, with the number of images that a PromptList gives. Raises InputError."""
        config, prompts = super().resolve(), len(source.texts)
        config.images_per_prompt = config.images_per_prompt or (GENEVAL_IMAGES if source.metadata else 1)
        most = prompts * config.images_per_prompt
        count = config.num_fid_samples = config.num_fid_samples or most
        if config.grid and prompts > count:
            raise InputError(f"--grid {config.grid} has no room for {prompts} prompts; pass a larger one")
        if count > most and not config.grid:
            raise InputError(f"--num-fid-samples {count}: --prompts gives {most} images; raise --images-per-prompt")
        return config

    def prompt_of_each_image(self, texts):
        """Prompts of all images: a picture has equally many of each."""
        if self.grid:
            return [texts[index * len(texts) // self.num_fid_samples] for index in range(self.num_fid_samples)]
        return [texts[index // self.images_per_prompt] for index in range(self.num_fid_samples)]


def generate_prompts(config):
    """Make a picture, or many images, of prompts; returns its path. Raises InputError."""
    source = read_prompts(config.prompts, config.global_seed)
    return generate(config.resolve(source), functools.partial(Prompts, source=source))


if __name__ == "__main__":
    with exit_on_input_error():
        generate_prompts(parse_flags(TextGenerateConfig, description=__doc__))

"""Runs a program with small presets, for tests: python tests/thin_program.py train.py FLAGS.

Every branch has two blocks, every head eight channels; the alignment encoder ENCODER has one block of 16 channels.
"""

import dataclasses
import runpy
import sys

from models.encoders import ENCODERS
from models.presets import PRESETS

ENCODER = "dinov2-vit-b"


def thin_presets():
    """Make every preset small; its heads, number of branches and kind stay."""
    for name, preset in PRESETS.items():
        ends = tuple(range(2, 2 * len(preset.df_idxs) + 3, 2))  # of the branches
        sizes = {"hidden_size": 8 * preset.num_heads, "projector_dim": 16, "depth": ends[-1] + 2 * (len(ends) == 1)}
        dmf_depth = preset.dmf_depth and 2
        PRESETS[name] = dataclasses.replace(preset, **sizes, df_idxs=ends[:-1], encoder_depth=2, dmf_depth=dmf_depth)


def thin_encoder():
    """Make ENCODER small."""
    family = ENCODERS[ENCODER]
    options = {**family.options, "embed_dim": 16, "depth": 1, "num_heads": 2}
    ENCODERS[ENCODER] = dataclasses.replace(family, width=16, options=options)


if __name__ == "__main__":
    thin_presets()
    thin_encoder()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""--compile: the parts of a network that repeat are compiled, each kind once, and the kernels are kept on disk."""

import os
from pathlib import Path

import torch

from models.deepflow import VeRA
from models.layers import VelocityLayer


def compile_blocks(model):
    """Compile, in place, the blocks, VeRA blocks and velocity layers of a network of any kind.

    Parts that are alike share one compilation, each shape of the batch has its own, and no name in the state dict
    changes. Data parallelism reduces a part's gradients while the backward pass is at work on the next.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut every part into the parameters of DDP's buckets
    for part in [*model.blocks, *(m for m in model.modules() if isinstance(m, VeRA | VelocityLayer))]:
        part.compile(fullgraph=True, dynamic=False)


def keep_compiled(folder):
    """Keep what is compiled in FOLDER/.compile_cache, so that no later process compiles it again.

    To be called before anything of the compiler is imported; TORCHINDUCTOR_CACHE_DIR, where set, goes first.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder).absolute() / ".compile_cache"))

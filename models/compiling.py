"""--compile: the repeated parts of a network are compiled, each kind once, and the kernels are cached on disk."""

import os
from pathlib import Path

import torch

from models.deepflow import VeRA
from models.layers import VelocityLayer


def compile_blocks(model):
    """Compile, in place, the blocks, VeRA blocks and velocity layers of a network of any kind.

    Identical parts share one compilation per batch shape, and no name in the state dict changes. Data parallelism
    reduces a part's gradients while the backward pass computes the next.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split every part at the boundaries of DDP's buckets
    for part in [*model.blocks, *(m for m in model.modules() if isinstance(m, VeRA | VelocityLayer))]:
        part.compile(fullgraph=True, dynamic=False)


def keep_compiled(folder):
    """Cache compiled kernels in FOLDER/.compile_cache, so that later processes need not compile them again.

    Call it before any part of the compiler is imported; TORCHINDUCTOR_CACHE_DIR, if set, takes precedence.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder).absolute() / ".compile_cache"))

"""Gradients of one step of a flow map's training, by so many processes; run by test_train_dmf.py.

    torchrun --nproc-per-node 2 tests/flow_map_gradients.py FILE wrapper|bare

wrapper: as train_dmf.py does it. bare: the forward pass goes round the wrapper, so that nothing is synchronised.
"""

import contextlib
import os
import sys
import types

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train_dmf
from common.flags import parse_flags
from dataset import DataInfo
from loss import GuidedTarget
from models import create_model
from training.distributed import rows_of_rank
from training.draws import draw_flow_map_step

BATCH = 8


def gradients(rank, world, through_wrapper):
    """{name: gradient} of one step on this rank's rows of a global batch, with guidance on."""
    line = tiny.map_flags("data", "exps", None, batch_size=BATCH, g_type="mg", g_max=0.9, seed=1)
    config = parse_flags(train_dmf.FlowMapConfig, line)
    info = DataInfo(BATCH, tiny.CLASSES, tiny.SPEC, (2 * tiny.SPEC.channels, tiny.SIZE, tiny.SIZE), 16)
    options = {"depth": 2, "df_idxs": (1,), "dmf_depth": 1, "input_size": tiny.SIZE, "num_classes": tiny.CLASSES}
    model = tiny.fill_(create_model("DeepFlow-DMF-Ti/2", **options), std=0.05)
    rows = rows_of_rank(BATCH, world, 1, rank)
    draws = draw_flow_map_step(0, config, (4, tiny.SIZE, tiny.SIZE), rows)
    moments = torch.randn(BATCH, *info.moments_shape, generator=torch.Generator().manual_seed(0))[rows]
    labels = (torch.arange(BATCH) % tiny.CLASSES)[rows]
    network = DistributedDataParallel(model) if world > 1 else model
    guide = GuidedTarget("mg", config.omega, model.velocity, tiny.CLASSES)
    loss, parts = train_dmf.objective(
        network if through_wrapper else model,
        types.SimpleNamespace(moments=moments, condition=labels),
        draws,
        model=model,
        guide=guide,
        autocast=contextlib.nullcontext,
        config=config,
        info=info,
        weights=[0.2, 1.0],
    )
    assert parts["guided_fraction"] > 0
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main(path, mode):
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    torch.save(gradients(rank, world, mode == "wrapper"), f"{path}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

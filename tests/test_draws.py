"""Draws of a training step: a function of seed, step and row, for new runs and for runs older than blocks of rows."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny
import torch

import train
from common.flags import parse_flags
from loss import flow_map_times, guided_samples, sample_times
from models.paths import PATHS
from training.checkpoint import checkpoint_path
from training.config import FlowMapConfig, TrainConfig
from training.distributed import rows_of_rank
from training.draws import BLOCK, NORMALS, STREAM, FlowMapDraws, StepDraws, draw_flow_map_step, draw_step

LATENT = (4, tiny.SIZE, tiny.SIZE)


def config_of(kind=TrainConfig, **changes):
    return parse_flags(kind, tiny.flags(**{"exp_name": "x", "batch_size": 8, "cfg_prob": 0.3, **changes})).resolve()


def test_draws_are_a_function_of_seed_and_step():
    draw = functools.partial(draw_step, num_branches=3, latent_shape=LATENT)
    first, again = (dataclasses.asdict(draw(5, config_of(seed=1))) for _ in range(2))
    assert not tiny.differences(first, again)
    for other in (draw(6, config_of(seed=1)), draw(5, config_of(seed=2))):
        assert all(not torch.equal(first[name], getattr(other, name)) for name in ("times", "posterior", "noise"))
    assert not torch.equal(first["posterior"], first["noise"])


BATCH = 40  # its last block is not full
KINDS = {
    "flow": (config_of(batch_size=BATCH), functools.partial(draw_step, num_branches=3)),
    "flow map": (config_of(FlowMapConfig, batch_size=BATCH, g_type="mg"), draw_flow_map_step),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """A configuration and its draw function."""
    config, draw = KINDS[request.param]
    return config, functools.partial(draw, config=config, latent_shape=LATENT)


@pytest.mark.parametrize("block", [BLOCK, 3, 0])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 1), (4, 2), (40, 1)])
def test_draws_of_a_rank_and_of_its_micro_batches_are_those_of_the_whole_batch(kind, block, world, accumulation):
    _, draw = kind
    whole = draw(7, block=block)
    for rank in range(world):
        rows = rows_of_rank(BATCH, world, accumulation, rank)
        draws = draw(7, rows=rows, block=block).to("cpu")
        for chosen in (slice(None), slice(1, 3)):
            assert not tiny.differences(vars(draws.part(chosen)), vars(whole.part(rows[chosen])))


def test_a_rank_draws_only_the_blocks_that_hold_its_rows(monkeypatch):
    seeds, default_rng = [], np.random.default_rng

    def noted(seed):
        seeds.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", noted)
    draw_step(7, config_of(batch_size=128), 3, LATENT, rows_of_rank(128, 4, 1, rank=1))
    assert seeds == [[0, 7, STREAM], [0, 7, NORMALS, 2], [0, 7, NORMALS, 3]]


def test_the_normals_are_the_same_for_ever():
    """Those of row 17 in one pixel."""
    config = config_of(batch_size=20, seed=3)
    draws = draw_step(2, config, 2, LATENT)
    found = [draws.posterior[17, 0, 0, 0].item(), draws.noise[17, 0, 0, 0].item()]
    assert (BLOCK, found) == (16, pytest.approx([0.5548083, -2.1756055], abs=1e-6))


def former_step(step, config, num_branches, latent_shape, *_):
    """Draws as they were made before blocks of rows existed: the whole batch from one generator, in order."""
    rng, n = np.random.default_rng([config.seed, step, 1]), config.batch_size
    times = sample_times(rng, n, num_branches, config.weighting, PATHS[config.path_type], config.tg_upper_bound)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    normals = (torch.from_numpy(rng.standard_normal((n, *latent_shape), dtype=np.float32)) for _ in range(2))
    return StepDraws(times, drop, *normals)


def former_flow_map_step(step, config, latent_shape):
    """Like former_step, for flow maps."""
    rng, n = np.random.default_rng([config.seed, step, 1]), config.batch_size
    logits = torch.from_numpy(rng.standard_normal((3, n), dtype=np.float32))
    means, stds = (config.P_mean, config.P_mean_t, config.P_mean_r), (config.P_std, config.P_std_t, config.P_std_r)
    times = flow_map_times(logits, means, stds)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    normals = (torch.from_numpy(rng.standard_normal((n, *latent_shape), dtype=np.float32)) for _ in range(3))
    guided = guided_samples(config.g_type, times, drop, config.g_min, config.g_max)
    return FlowMapDraws(times, drop, *normals, guided)


def test_draws_without_blocks_are_the_former_ones():
    for (config, draw), former in zip(KINDS.values(), (former_step, former_flow_map_step), strict=True):
        branches = {"num_branches": 3} if draw is not draw_flow_map_step else {}
        expected = former(5, config, latent_shape=LATENT, **branches)
        assert not tiny.differences(vars(draw(5, config, latent_shape=LATENT, block=0)), vars(expected))


def test_a_run_from_before_there_were_blocks_keeps_its_draws(tmp_path, monkeypatch):
    data = tiny.data_folder(tmp_path / "data")
    with monkeypatch.context() as before:
        before.setattr(train, "draw_step", former_step)
        run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=2)
    former, path = tiny.load(checkpoint_path(run_dir, 4)), checkpoint_path(run_dir, 2)
    content = tiny.load(path)
    del content["train_state"]["noise_block"]
    torch.save(content, path)
    tiny.run_train(data, tmp_path, resume=2)
    found = tiny.load(checkpoint_path(run_dir, 4))
    for entry in ("model", "ema", "opt"):
        assert not tiny.differences(found[entry], former[entry]), entry
    assert found["train_state"]["noise_block"] == 0

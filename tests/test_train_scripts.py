"""script/*/train.sh, of dmf/ and t2i/ too: the published recipes in flags that exist; signals arrive."""

import os
import subprocess

import pytest
import tiny

from common.flags import parse_flags
from models import model_config
from train_dmf import FlowMapConfig
from train_t2i import TextTrainConfig
from training.config import TrainConfig
from training.stop import SIGNALS

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"
"""
FLOW = {
    "base": ("DeepFlow-B/2", 12, (6,), [0.2, 1.0], 400_000),
    "large": ("DeepFlow-L/2", 18, (6, 12), [0.2, 0.2, 1.0], 400_000),
    "xlarge": ("DeepFlow-XL/2", 24, (8, 16), [0.2, 0.2, 1.0], 2_000_000),
}
MAPS = {
    "b": ("DMFT-B/2", 8, 0.7, 400_000, None),
    "xl": ("DMFT-XL/2", 20, 0.7, 400_000, None),
    "xl_512": ("DMFT-XL/2", 20, 0.8, 800_000, True),
}


def launched(script, tmp_path, *flags, **environment):
    """(program, its flags) that a script gives to torchrun; signals and patience are checked."""
    stub = tmp_path / "torchrun"
    stub.write_text(STUB)
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CKPT": "flow.pt", "NUM_GPUS": "2", **environment}
    done = subprocess.run(
        ["bash", f"script/{script}", *flags], cwd=tiny.ROOT, env=env, capture_output=True, text=True, check=True
    )
    patience, *words = done.stdout.splitlines()
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launcher = words[:program]
    assert launcher[:3] == ["--standalone", "--nproc-per-node", "2"]
    handled = launcher[launcher.index("--signals-to-handle") + 1].split(",")
    assert {number.name for number in SIGNALS} <= set(handled)
    assert int(patience) >= 600
    return words[program], words[program + 1 :]


@pytest.mark.parametrize("size", FLOW)
def test_recipes_of_deepflow(size, tmp_path):
    program, line = launched(f"{size}/train.sh", tmp_path, "--tg-upper-bound", "0.05")
    config = parse_flags(TrainConfig, line)
    config.check()
    model, depth, df_idxs, weights, steps = FLOW[size]
    options = model_config(config.model, depth=config.trans_depth, df_idxs=config.df_idxs)
    assert (program, config.model, options["depth"], options["df_idxs"]) == ("train.py", model, depth, df_idxs)
    assert config.branch_weights(len(df_idxs) + 1) == weights
    assert (config.max_train_steps, config.batch_size, config.learning_rate) == (steps, 256, 1e-4)
    assert (config.weighting, config.tg_upper_bound, config.resume) == ("lognormal", 0.05, "auto")


@pytest.mark.parametrize("size", MAPS)
def test_recipes_of_flow_maps(size, tmp_path):
    program, line = launched(f"dmf/train_{size}.sh", tmp_path, "--g-type", "distill")
    config = parse_flags(FlowMapConfig, line)
    config.check()
    model, dmf_depth, g_max, steps, qk_norm = MAPS[size]
    assert (program, config.pretrained, config.g_type) == ("train_dmf.py", "flow.pt", "distill")
    assert (config.model, config.dmf_depth, config.qk_norm) == (model, dmf_depth, qk_norm)
    assert (config.omega, config.g_min, config.g_max, config.max_train_steps) == (0.6, 0.0, g_max, steps)
    assert (config.time_means(), config.time_stds()) == ((0.0, 0.4, -1.2), (1.0, 1.0, 1.0))
    assert (config.adam_beta1, config.adam_beta2, config.ema_decay, config.resume) == (0.9, 0.95, 0.9999, "auto")


@pytest.mark.parametrize("aligned", [False, True])
def test_recipe_of_text_to_image(aligned, tmp_path):
    program, line = launched("t2i/train.sh", tmp_path, "--seed", "3", SSL=str(int(aligned)))
    config = parse_flags(TextTrainConfig, line)
    config.check()
    assert (program, config.model, config.max_train_steps) == ("train_t2i.py", "DeepFlow-MMDiT-L/2", 150_000)
    options = model_config(config.model, **config.model_flags())
    assert (options["depth"], options["hidden_size"], options["num_heads"]) == (24, 768, 24)
    assert (options["df_idxs"], options["legacy_scaling"]) == ((8, 16), aligned)
    assert config.branch_weights(3) == [0.2, 0.2, 1.0]
    assert (config.batch_size, config.learning_rate, config.ema_decay) == (256, 1e-4, 0.9999)
    assert (config.adam_beta1, config.adam_beta2, config.adam_weight_decay, config.max_grad_norm) == (0.9, 0.999, 0, 1)
    assert (config.weighting, config.tg_upper_bound, config.acc_coeff) == ("uniform", 0.01, 1.0)
    assert (config.cfg_prob, config.path_type, config.resume, config.seed) == (0.1, "linear", "auto", 3)
    assert (list(config.encoders()), config.proj_coeff) == (["dinov2-vit-b"] if aligned else [], 0.5)

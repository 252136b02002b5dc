"""script/*/train.sh, dmf/ and t2i/ included: the published recipes as resolved configurations; signals arrive."""

import os
import subprocess

import pytest
import tiny

from common.flags import parse_flags
from models import model_config
from training.config import FlowMapConfig, TextTrainConfig, TrainConfig
from training.stop import SIGNALS

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"
"""
FLOW = {
    "base": ("DeepFlow-B/2", 12, (6,), [0.2, 1.0], 400_000, 100_000),
    "large": ("DeepFlow-L/2", 18, (6, 12), [0.2, 0.2, 1.0], 400_000, 100_000),
    "xlarge": ("DeepFlow-XL/2", 24, (8, 16), [0.2, 0.2, 1.0], 2_000_000, 200_000),
}
MAPS = {
    "b": ("DMFT-B/2", 8, 0.7, 400_000, None, "data/imagenet256"),
    "xl": ("DMFT-XL/2", 20, 0.7, 400_000, None, "data/imagenet256"),
    "xl_512": ("DMFT-XL/2", 20, 0.8, 800_000, True, "data/imagenet512"),
}


def start(script, tmp_path, *flags, **environment):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CKPT": "flow.pt", "NUM_GPUS": "2", **environment}
    command = ["bash", f"script/{script}", *flags]
    return subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, check=False)


def launched(script, tmp_path, *flags, **environment):
    """(program, its flags) that a script passes to common/launch.py; signals and patience are checked."""
    done = start(script, tmp_path, *flags, **environment)
    assert done.returncode == 0, done.stderr
    patience, *words = done.stdout.splitlines()
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launcher = words[:program]
    assert launcher[:5] == ["-m", "common.launch", "--standalone", "--nproc-per-node", environment.get("NUM_GPUS", "2")]
    handled = launcher[launcher.index("--signals-to-handle") + 1].split(",")
    assert {number.name for number in SIGNALS} <= set(handled)
    assert int(patience) >= 600
    return words[program], words[program + 1 :]


def name_of(config):
    """The name of a recipe's run, on data of the recipe's resolution."""
    return config.resolve().named(config.resolution or 256).exp_name


def check_common(config):
    """What all published runs share, most of it defaults."""
    config.check()
    assert (config.path_type, config.batch_size, config.learning_rate, config.max_grad_norm) == ("linear", 256, 1e-4, 1)
    assert (config.adam_beta1, config.adam_weight_decay, config.ema_decay, config.acc_coeff) == (0.9, 0, 0.9999, 1)
    assert (config.resume, config.seed, config.compile) == ("auto", 0, True)


@pytest.mark.parametrize("size", FLOW)
def test_recipes_of_deepflow(size, tmp_path):
    program, line = launched(f"{size}/train.sh", tmp_path, "--tg-upper-bound", "0.05")
    config = parse_flags(TrainConfig, line)
    check_common(config)
    model, depth, df_idxs, weights, steps, kept = FLOW[size]
    options = model_config(config.model, **config.model_flags())
    assert (program, config.model, options["depth"], options["df_idxs"]) == ("train.py", model, depth, df_idxs)
    assert not options["legacy_scaling"] and not options["qk_norm"]
    assert config.branch_weights(len(df_idxs) + 1) == weights
    assert (config.max_train_steps, config.checkpointing_steps) == (steps, kept)
    assert (config.weighting, config.tg_upper_bound, config.cfg_prob) == ("lognormal", 0.05, 0.1)
    assert (config.adam_beta2, config.data_dir, config.output_dir) == (0.999, "data/imagenet256", "exps")


def test_the_baseline_is_one_flag_away(tmp_path):
    _, line = launched("base/train.sh", tmp_path, "--model", "SiT-B/2")
    config = parse_flags(TrainConfig, line)
    assert (config.model, name_of(config)) == ("SiT-B/2", "sit-b")
    assert model_config(config.model, **config.model_flags()) == model_config("SiT-B/2")
    assert config.branch_weights(1) == [1.0]


def test_the_environment_of_a_recipe(tmp_path):
    own = {"DATA_DIR": "my data", "OUTPUT_DIR": "out", "EXP_NAME": "a b", "MIXED_PRECISION": "fp16", "NUM_GPUS": "1"}
    _, line = launched("base/train.sh", tmp_path, "--no-compile", **own)
    config = parse_flags(TrainConfig, line)
    assert (config.data_dir, config.output_dir, config.exp_name) == ("my data", "out", "a b")
    assert (config.mixed_precision, config.compile) == ("fp16", False)


@pytest.mark.parametrize("size", MAPS)
def test_recipes_of_flow_maps(size, tmp_path):
    program, line = launched(f"dmf/train_{size}.sh", tmp_path)
    config = parse_flags(FlowMapConfig, line)
    check_common(config)
    model, dmf_depth, g_max, steps, qk_norm, data_dir = MAPS[size]
    assert (program, config.init_from, config.g_type) == ("train_dmf.py", "flow.pt", "mg")
    assert (config.model, config.qk_norm, config.data_dir) == (model, qk_norm, data_dir)
    assert config.dmf_depth in (None, dmf_depth) and model_config(model)["dmf_depth"] == dmf_depth
    assert (config.omega, config.g_min, config.g_max, config.cfg_prob) == (0.6, 0.0, g_max, 0.1)
    assert (config.max_train_steps, config.checkpointing_steps, config.adam_beta2) == (steps, 100_000, 0.95)
    assert (config.P_mean, config.P_mean_t, config.P_mean_r) == (0.0, 0.4, -1.2)
    assert config.P_std == config.P_std_t == config.P_std_r == 1.0


@pytest.mark.parametrize(
    ("train", "evaluate", "cls"),
    [
        ("base/train.sh", "base/eval.sh", TrainConfig),
        ("large/train.sh", "large/eval.sh", TrainConfig),
        ("xlarge/train.sh", "xlarge/eval.sh", TrainConfig),
        ("xlarge/train.sh", "guided.sh", TrainConfig),
        ("dmf/train_b.sh", "dmf/eval_b.sh", FlowMapConfig),
        ("dmf/train_xl.sh", "dmf/eval_xl.sh", FlowMapConfig),
        ("dmf/train_xl_512.sh", "dmf/eval_xl_512.sh", FlowMapConfig),
        ("t2i/train.sh", "t2i/eval.sh", TextTrainConfig),
    ],
)
def test_what_a_recipe_trains_is_what_its_evaluation_looks_for(tmp_path, train, evaluate, cls):
    _, line = launched(train, tmp_path)
    assert "--exp-name" not in line
    name = name_of(parse_flags(cls, line))
    assert f"EXP_NAME=${{EXP_NAME:-{name}}}\n" in (tiny.ROOT / "script" / evaluate).read_text()
    _, line = launched(train, tmp_path, EXP_NAME="own")
    assert parse_flags(cls, line).exp_name == "own"


def test_a_variant_of_a_recipe_has_a_name_of_its_own(tmp_path):
    for flags, name in (
        (["--model", "SiT-XL/2"], "sit-xl"),
        (["--trans-depth", "21"], "deepflow-xl-3t-d21"),
        (["--weighting", "uniform"], "deepflow-xl-3t-uniform"),
        (["--ssl-align"], "deepflow-xl-3t-dinov2b"),
    ):
        _, line = launched("xlarge/train.sh", tmp_path, *flags)
        assert name_of(parse_flags(TrainConfig, line)) == name


def test_a_flow_map_needs_a_flow_model_to_start_from(tmp_path):
    done = start("dmf/train_b.sh", tmp_path, CKPT="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: CKPT ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_recipe_of_the_baseline(size, tmp_path):
    program, line = launched("sit/train.sh", tmp_path, "--ssl-align", "--enc-type", "dinov1-vit-b", SIZE=size)
    config = parse_flags(TrainConfig, line)
    check_common(config)
    assert (program, config.model, config.weighting) == ("train.py", f"SiT-{size}/2", "lognormal")
    assert (config.max_train_steps, config.checkpointing_steps) == (400_000, 100_000)
    assert list(config.encoders()) == ["dinov1-vit-b"]


def test_recipe_at_512(tmp_path):
    program, line = launched("xlarge/train_512.sh", tmp_path)
    config = parse_flags(TrainConfig, line)
    check_common(config)
    assert (program, config.model, config.weighting) == ("train.py", "DeepFlow-XL/2", "lognormal")
    assert (config.max_train_steps, config.resolution, config.data_dir) == (2_000_000, 512, "data/imagenet512")


@pytest.mark.parametrize(
    ("size", "resolution", "block", "steps"),
    [("XL", 256, 8, 4_000_000), ("XL", 512, 8, 2_000_000), ("B", 256, 4, 4_000_000)],
)
def test_recipe_of_the_flow_model_that_flow_maps_start_from(size, resolution, block, steps, tmp_path):
    program, line = launched("dmf/train_flow.sh", tmp_path, SIZE=size, RESOLUTION=str(resolution))
    config = parse_flags(TrainConfig, line)
    check_common(config)
    assert (program, config.model, config.weighting) == ("train.py", f"SiT-{size}/2", "lognormal")
    assert (config.resolution, config.data_dir) == (resolution, f"data/imagenet{resolution}")
    assert (config.adam_beta2, config.max_train_steps) == (0.95, steps)
    assert (list(config.encoders()), config.resolve().proj_coeff) == (["dinov2-vit-b"], 0.5)
    assert model_config(config.model, **config.model_flags())["encoder_depth"] == block


@pytest.mark.parametrize("aligned", [False, True])
def test_recipe_of_text_to_image(aligned, tmp_path):
    program, line = launched("t2i/train.sh", tmp_path, SSL=str(int(aligned)))
    config = parse_flags(TextTrainConfig, line).resolve()
    check_common(config)
    assert (program, config.model, config.max_train_steps) == ("train_t2i.py", "DeepFlow-MMDiT-L/2", 150_000)
    assert (config.checkpointing_steps, config.data_dir) == (50_000, "data/coco256/train")
    options = model_config(config.model, **config.model_flags())
    assert (options["depth"], options["hidden_size"], options["num_heads"]) == (24, 768, 24)
    assert (options["df_idxs"], options["legacy_scaling"]) == ((8, 16), aligned)
    assert config.branch_weights(3) == [0.2, 0.2, 1.0]
    assert (config.weighting, config.tg_upper_bound, config.adam_beta2) == ("uniform", 0.01, 0.999)
    assert (list(config.encoders()), config.proj_coeff) == (["dinov2-vit-b"] if aligned else [], 0.5)


def test_text_to_image_baseline(tmp_path):
    _, line = launched("t2i/train.sh", tmp_path, SSL="1", MODEL="MMDiT-L/2")
    config = parse_flags(TextTrainConfig, line)
    assert (config.model, name_of(config), config.legacy_scaling) == ("MMDiT-L/2", "mmdit-dinov2b", False)
    assert list(config.encoders()) == ["dinov2-vit-b"]

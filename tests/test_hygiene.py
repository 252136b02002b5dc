"""Rules of the house: every flag is read, published flags exist, imports go one way and need no network, no GPU."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.flags import HIDDEN, parse_flags
from generate import GenerateConfig
from generate_t2i import TextGenerateConfig
from sampling.manifest import manifest_path
from train_dmf import FlowMapConfig
from train_t2i import TextTrainConfig
from training.config import TrainConfig
from training.plot import PlotFlags

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "venv", "tests", "quickstart", "exps", "data"} & set(path.relative_to(ROOT).parts[:-1])
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


def trees(*parts):
    """{path: syntax tree} of the project's sources whose path begins with one of `parts`."""
    names = {path: str(path.relative_to(ROOT)) for path in SOURCES}
    chosen = [path for path in SOURCES if not parts or names[path].startswith(parts)]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in chosen}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def calls(tree):
    """What is called in a file, as text: `sys.path.insert`."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_sources_are_found():
    assert {"train.py", "generate.py", "trainer.py", "deepflow.py"} <= {path.name for path in SOURCES}


# ------------------------------------------------------------------------------------------------- flags


def attributes_read(tree, owners):
    """Names read as owner.NAME or self.owner.NAME."""
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in reads if ast.unparse(node.value) in owners}


def names_of_getattr(tree):
    """Strings in functions that call getattr, validation aside: it reads every flag and uses none."""
    users = [
        function
        for function in functions(tree)
        if function.name != "check" and any(ast.unparse(n) == "getattr" for n in ast.walk(function))
    ]
    strings = [node.value for user in users for node in ast.walk(user) if isinstance(node, ast.Constant)]
    return {value for value in strings if isinstance(value, str)}


@pytest.mark.parametrize(
    ("config", "rooms"),
    [
        (TrainConfig, ("train.py", "training/")),
        (FlowMapConfig, ("train_dmf.py", "training/")),
        (TextTrainConfig, ("train.py", "train_t2i.py", "training/")),
        (GenerateConfig, ("generate.py", "sampling/", "models/published.py")),
        (TextGenerateConfig, ("generate.py", "generate_t2i.py", "sampling/", "models/published.py")),
    ],
    ids=["train", "train_dmf", "train_t2i", "generate", "generate_t2i"],
)
def test_every_flag_is_read(config, rooms):
    read = set()
    for tree in trees(*rooms).values():
        read |= attributes_read(tree, {"config", "self.config", "run.config"}) | names_of_getattr(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in {part.__name__ for part in config.__mro__}:
                read |= attributes_read(node, {"self"})
    assert [field.name for field in dataclasses.fields(config) if field.name not in read] == []


PUBLISHED_TRAIN = """--output-dir exps --exp-name b2 --logging-dir logs --sampling-steps 10000 --resume-step 0
    --model DeepFlow-B/2 --num-classes 1000 --fused-attn --no-qk-norm --data-dir data --resolution 256 --batch-size 256
    --allow-tf32 --mixed-precision fp16 --epochs 1400 --max-train-steps 400000 --checkpointing-steps 200000
    --gradient-accumulation-steps 1 --learning-rate 1e-4 --adam-beta1 0.9 --adam-beta2 0.999 --adam-weight-decay 0
    --adam-epsilon 1e-8 --max-grad-norm 1.0 --seed 0 --num-workers 4 --path-type linear --prediction v --cfg-prob 0.1
    --weighting lognormal --tg-upper-bound 0.01 --scale-weight 0.2 1.0 --df-idxs [6] --acc-coeff 1.0 --legacy-scaling
    --trans-depth 12 --ssl-align --enc-type dinov2-vit-b --proj-coeff 0.5 --ema-decay 0.9999 --report-to wandb"""
PUBLISHED_GENERATE = """--global-seed 0 --tf32 --ckpt 0400000.pt --sample-dir samples --model DeepFlow-XL/2
    --num-classes 1000 --resolution 256 --fused-attn --no-qk-norm --vae ema --per-proc-batch-size 64
    --num-fid-samples 50000 --mode sde --cfg-scale 1.0 --projector-embed-dims 768 --path-type linear --num-steps 250
    --no-heun --guidance-low 0 --guidance-high 1 --ssl-align --df-idxs [8,16] --trans-depth 24 --legacy-scaling"""


def test_published_train_command_is_understood():
    config = parse_flags(TrainConfig, PUBLISHED_TRAIN.split())
    expected = {"exp_name": "b2", "allow_tf32": True, "qk_norm": False, "scale_weight": [0.2, 1.0], "ssl_align": True}
    expected.update(legacy_scaling=True, trans_depth=12, mixed_precision="fp16", resume="0", learning_rate=1e-4)
    assert expected.items() <= dataclasses.asdict(config).items()
    assert parse_flags(TrainConfig, ["--exp-name", "x", "--enc-type", "None"]).enc_type == "None"


def test_published_generate_command_is_understood():
    config = parse_flags(GenerateConfig, PUBLISHED_GENERATE.split())
    expected = {"ckpt": "0400000.pt", "tf32": True, "qk_norm": False, "heun": False, "ssl_align": True, "vae": "ema"}
    expected.update(num_fid_samples=50_000, per_proc_batch_size=64, num_steps=250, cfg_scale=1.0, guidance_high=1.0)
    assert expected.items() <= dataclasses.asdict(config).items()


def test_defaults_are_the_published_ones():
    config = parse_flags(TrainConfig, []).resolve()
    expected = {"output_dir": "exps", "logging_dir": "logs", "sampling_steps": 10_000, "resume": "0", "seed": 0}
    expected.update(batch_size=256, epochs=1400, max_train_steps=400_000, checkpointing_steps=200_000)
    expected.update(
        gradient_accumulation_steps=1, learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999, ema_decay=0.9999
    )
    expected.update(adam_weight_decay=0, adam_epsilon=1e-8, max_grad_norm=1, path_type="linear", prediction="v")
    expected.update(cfg_prob=0.1, weighting="lognormal", tg_upper_bound=0.01, acc_coeff=1, ema_decay=0.9999)
    expected.update(
        ssl_align=False,
        qk_norm=False,
        enc_type="dinov2-vit-b",
        proj_coeff=0.5,
        legacy_scaling=False,
        fused_attn=True,
        allow_tf32=True,
    )
    assert expected.items() <= dataclasses.asdict(config).items()
    assert config.branch_weights(3) == [0.2, 0.2, 1.0]
    config = parse_flags(GenerateConfig, ["--ckpt", "x"]).for_model("flow")
    expected = {"global_seed": 0, "tf32": True, "sample_dir": None, "per_proc_batch_size": 32, "mode": "sde"}
    expected.update(num_fid_samples=50_000, cfg_scale=1.0, guidance_low=0, guidance_high=1, heun=False)
    assert expected.items() <= dataclasses.asdict(config).items()


@pytest.mark.parametrize("given", [["[8,16]"], ["8,16"], ["8", "16"], ["[8, 16]"], ["8 16"]])
def test_forms_of_key_layers(given):
    from models.presets import parse_df_idxs

    config = parse_flags(TrainConfig, ["--exp-name", "x", "--df-idxs", *given])
    assert parse_df_idxs(config.df_idxs) == (8, 16)


@pytest.mark.parametrize("config", [TrainConfig, FlowMapConfig, TextTrainConfig, GenerateConfig, TextGenerateConfig])
def test_help_names_every_flag(config, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(config, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(config):
        name = field.metadata.get("name", f"--{field.name.replace('_', '-')}")
        assert name in text or field.metadata["help"] == HIDDEN
        assert field.metadata["help"]


@pytest.mark.parametrize(
    ("config", "words"),
    [(TextGenerateConfig, r"--shift|--dmf-depth|euler|restart|--projector"), (TrainConfig, "--prediction")],
)
def test_help_leaves_out_what_a_program_has_no_use_for(config, words, capsys):
    with pytest.raises(SystemExit):
        parse_flags(config, ["--help"])
    assert not re.search(words, capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------- structure


def test_no_function_is_longer_than_fifty_lines():
    long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path, tree in trees().items()
        for function in functions(tree)
        if function.end_lineno - function.lineno + 1 > 50
    ]
    assert not long


def test_no_file_is_longer_than_350_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 350} == {}


def test_command_lines_are_declared_as_flags():
    """argparse is used in one place."""
    users = [path for path, tree in trees().items() if "ArgumentParser" in attributes_read(tree, {"argparse"})]
    assert [str(path.relative_to(ROOT)) for path in users] == ["common/flags.py"]


def test_no_program_changes_the_path_of_imports():
    assert [str(path.relative_to(ROOT)) for path, tree in trees().items() if "sys.path.insert" in calls(tree)] == []


LADDER = [  # a room imports from the rungs below it and from itself
    {"common"},
    {"models"},
    {"latents"},
    {"loss", "samplers", "dataset"},
    {"sampling", "training"},
]
BESIDE = {  # beside the root scripts: they use the whole ladder, themselves and these
    "train": {"preprocessing"},
    "train_dmf": {"preprocessing"},
    "train_t2i": {"train"},
    "generate_t2i": {"generate"},
    "preprocessing": set(),
    "evaluations": {"preprocessing"},
    "digits": {"preprocessing", "evaluations"},
    "studies": {"digits", "evaluations", "preprocessing"},
}
ROOMS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES} - {"benchmarks"}


def allowed_imports():
    """{room: rooms that it may import}."""
    allowed, below = {}, set()
    for rung in LADDER:
        allowed.update({room: below | {room} for room in rung})
        below = below | rung
    return allowed | {room: below | {room} | BESIDE.get(room, set()) for room in ROOMS - below}


def rooms_imported(tree):
    """{room: line} of the project's rooms that a file imports, at its top or inside a function."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found[(node.module or "").split(".")[0]] = node.lineno
        elif isinstance(node, ast.Import):
            found.update({name.name.split(".")[0]: node.lineno for name in node.names})
    return {room: line for room, line in found.items() if room in ROOMS}


def test_imports_go_down_the_ladder():
    allowed = allowed_imports()
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path, tree in trees().items()
        for other, line in rooms_imported(tree).items()
        if (room := path.relative_to(ROOT).parts[0].removesuffix(".py")) in ROOMS and other not in allowed[room]
    ]
    assert not wrong


def test_no_file_has_a_name_of_the_standard_library():
    names = {path.stem for path in [*SOURCES, *ROOT.glob("tests/*.py")]} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names


def test_test_files_are_found_by_name_alone():
    assert not (ROOT / "tests/__init__.py").exists()
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert len(names) == len(set(names))


IMPORT_ALL = """
import importlib.util, socket, sys

def refuse(*args, **kwargs):
    raise SystemExit(f"network access while importing: {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
for number, path in enumerate(sys.argv[2:]):
    print(path, flush=True)
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
    else:
        spec = importlib.util.spec_from_file_location(f"file{number}", f"{sys.argv[1]}/{path}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
import torch
assert not torch.cuda.is_initialized()
print("done")
"""


def test_importing_anything_needs_no_network_and_no_gpu(tmp_path):
    """In an empty folder, and with no cache of the hub to fall back on."""
    paths = [str(path.relative_to(ROOT)) for path in SOURCES]
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env.update(CUDA_VISIBLE_DEVICES="", HF_HOME=str(tmp_path / "hub"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT), *paths],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1] + done.stderr
    assert done.stdout.splitlines() == [*paths, "done"]
    assert not list(tmp_path.iterdir())


def test_default_outputs_are_ignored_by_git():
    picture = parse_flags(GenerateConfig, ["--ckpt", "x", "--grid", "1x1"]).resolve().out
    outputs = {picture, str(manifest_path(picture)), parse_flags(PlotFlags, ["x"]).out}
    assert {f"/{output}" for output in outputs} <= {*(ROOT / ".gitignore").read_text().splitlines()}

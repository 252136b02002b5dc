"""Commands of the published repositories, as they are pasted: taken, taken under another name, or refused in a line."""

import dataclasses
import re
import shlex
import zipfile

import pytest
import tiny
import torch

import train
import train_dmf
from common.errors import InputError, exit_on_input_error, say
from common.flags import parse_commands, parse_flags, shown
from common.published_flags import MEASURING, OURS, REFUSED, SAMPLING, TRAINING, UNUSED
from dataset import open_dataset
from evaluations.calculate_metrics import CalcFlags
from generate import GenerateConfig
from models.attention import set_attention
from preprocessing import dataset_tools
from training.config import FlowMapConfig, TextTrainConfig, TrainConfig
from training.plot import PlotFlags

SIT_TRAIN = """--model SiT-XL/2 --data-path /path/to/imagenet/train --results-dir out --image-size 256
    --num-classes 1000 --epochs 80 --global-batch-size 128 --global-seed 3 --vae ema --num-workers 4 --log-every 50
    --ckpt-every 50000 --sample-every 5000 --wandb --path-type Linear --prediction velocity --loss-weight None"""
SIT_SAMPLE = """SDE --model SiT-XL/2 --num-fid-samples 50000 --image-size 512 --num-sampling-steps 100 --global-seed 1
    --ckpt a.pt --sampling-method Euler --path-type GVP --prediction=velocity --last-step Mean --last-step-size 0.04
    --diffusion-form sigma"""
REPA_TRAIN = """--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v
    --weighting=uniform --model=SiT-S/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8 --output-dir=exps
    --exp-name=linear-dinov2-b-enc8 --data-dir=/absent"""
REPA_SAMPLE = """--model SiT-XL/2 --num-fid-samples 50000 --ckpt a.pt --path-type=linear --encoder-depth=8
    --projector-embed-dims=768 --per-proc-batch-size=64 --mode=sde --num-steps=250 --cfg-scale=1.8 --guidance-high=0.7
    --legacy --resolution 256"""
DMF_TRAIN = """--exp-name map --model DMFT-S/2 --from-scratch --dmf-depth 8 --torch-compile --attn-func base
    --mixed-precision bf16 --project-name dmf --wandb-dir /wandb --g-type mg --omega 0.6 --g-min 0.0 --g-max 0.7
    --P_mean 0.0 --P-mean-t 0.4 --P_mean_r=-1.2 --adam-beta2 0.95 --data-dir /absent"""
DMF_SAMPLE = "--ckpt a.pt --mode euler --num-steps 4 --shift 1.0 --g-min 0.1 --g-max=0.7 --create-npz --attn-func base"
DEEPFLOW_TRAIN = """--exp-name deepflow_b --model DeepFlow-S/2 --data-dir="" --resolution 256 --batch-size 256
    --allow-tf32 --mixed-precision fp16 --max-train-steps 400000 --ema-param 0.9999 --weighting lognormal
    --scale-weight 0.2 1.0 --df-idxs [6] --tg-upper-bound 0.01 --acc-coeff 1.0""".replace('""', "")


def holds(config, **expected):
    for name, value in expected.items():
        assert getattr(config, name) == value, name


def dry_run(program, cls, *words):
    """Describe a run in this process, as on a machine without GPU; returns the configuration."""
    with tiny.fresh_accelerate(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        config = parse_flags(cls, [*words, "--dry-run"])
        program.train(config)
        return config.resolve()


def refusal(cls, *words):
    with pytest.raises(InputError) as caught:
        parse_flags(cls, list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("typed", ["--seed", "--global-seed"])
def test_an_error_names_the_flag_that_was_typed(typed, capsys):
    with pytest.raises(SystemExit) as end, exit_on_input_error():
        parse_flags(GenerateConfig, ["--ckpt", "x", typed, "-1"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {typed} -1 is out of range")


def test_an_error_names_a_published_flag_that_was_typed(capsys):
    with pytest.raises(SystemExit), exit_on_input_error():
        parse_flags(TrainConfig, ["--image-size", "0"])
    assert "--image-size 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("SDE --sampling-method Heun", "--sampling-method Heun is a method for the ODE; pass --mode ode"),
        ("--no-create-npz --no-decode", "--no-decode keeps latents, in an npz; leave out --no-create-npz and --grid"),
        ("--num_steps 0", "--num_steps 0 is out of range"),
    ],
)
def test_errors_show_the_words_that_were_typed(words, said, capsys):
    with pytest.raises(SystemExit), exit_on_input_error():
        parse_flags(GenerateConfig, [*words.split(), "--ckpt", "x"]).resolve()
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_remarks_show_the_flag_that_was_typed(capsys):
    holds(parse_flags(TrainConfig, ["--data_path", "/absent", "--model", "SiT-Ti/2"]), weighting="uniform")
    dry_run(train, TrainConfig, "--data-path", "/absent", "--model", "DeepFlow-Ti/2")
    assert "--data-path /absent does not exist" in capsys.readouterr().out
    say("next: python train.py --data-dir DATA")  # another program may lack that name
    assert "--data-dir" in capsys.readouterr().out


def test_sit_training():
    config = parse_flags(TrainConfig, SIT_TRAIN.split())
    holds(config, data_dir="/path/to/imagenet/train", output_dir="out", resolution=256, batch_size=128, seed=3)
    holds(config, weighting="uniform")
    holds(parse_flags(TrainConfig, [*SIT_TRAIN.split(), "--weighting", "lognormal"]), weighting="lognormal")
    holds(parse_flags(TrainConfig, SIT_TRAIN.replace("--data-path", "--data-dir").split()), weighting="lognormal")
    holds(
        config, checkpointing_steps=50_000, sampling_steps=5000, report_to="wandb", path_type="linear", prediction="v"
    )


def test_sit_sampling(capsys):
    config = parse_flags(GenerateConfig, SIT_SAMPLE.split())
    holds(config, mode="sde", resolution=512, num_steps=100, global_seed=1, path_type="cosine", ckpt="a.pt", heun=False)
    assert "--last-step is unused" in capsys.readouterr().err
    config = parse_flags(GenerateConfig, "ODE --ckpt a.pt --image-size=256 --sampling-method heun".split())
    holds(config, mode="ode", resolution=256, heun=True)
    for name, value in (
        ("sampling-method", "dopri5"),
        ("atol", "1e-6"),
        ("diffusion-form", "SBDM"),
        ("last-step", "x"),
    ):
        for words in ([f"--{name}", value], [f"--{name}={value}"]):
            assert f"--{name} is not supported" in refusal(GenerateConfig, "--ckpt", "a.pt", *words)


def test_repa_training_aligns(capsys):
    config = dry_run(train, TrainConfig, *REPA_TRAIN.split())
    assert config.ssl_align and config.encoder_depth == 8 and list(config.encoders()) == ["dinov2-vit-b"]
    assert "alignment, weight 0.5: dinov2-vit-b" in capsys.readouterr().out


def test_repa_sampling(capsys):
    config = parse_flags(GenerateConfig, REPA_SAMPLE.split())
    holds(config, mode="sde", num_steps=250, cfg_scale=1.8, guidance_high=0.7, per_proc_batch_size=64, resolution=256)
    remarks = capsys.readouterr().err
    assert "--encoder-depth is unused" in remarks and "--legacy is unused" in remarks


def test_decoupled_meanflow_training(capsys):
    try:
        config = dry_run(train_dmf, FlowMapConfig, *DMF_TRAIN.split())
    finally:
        set_attention("auto")
    holds(config, compile=True, attn_func="base", logging_dir="/wandb", g_min=0.0, g_max=0.7, P_mean=0, P_mean_r=-1.2)
    captured = capsys.readouterr()
    assert config.model in captured.out and "--project-name is unused" in captured.err


def test_decoupled_meanflow_sampling():
    config = parse_flags(GenerateConfig, DMF_SAMPLE.split())
    holds(config, guidance_low=0.1, guidance_high=0.7, format="both", mode="euler", num_steps=4)
    holds(parse_flags(GenerateConfig, ["--ckpt", "a", "--no-create-npz"]), format="png")


def test_deepflow_training_is_described_without_gpu_and_data(capsys):
    config = dry_run(train, TrainConfig, *DEEPFLOW_TRAIN.split())
    holds(config, ema_decay=0.9999, ssl_align=False, data_dir=TrainConfig.data_dir, mixed_precision="fp16")
    assert config.model in capsys.readouterr().out
    holds(parse_flags(TrainConfig, ["--data-dir", "", "--dry-run"]), data_dir=TrainConfig.data_dir, dry_run=True)
    for empty in (["--data-dir="], ["--data-dir", ""]):
        assert "--data-dir is empty" in refusal(TrainConfig, *empty)
    assert "--weights" in refusal(GenerateConfig, "--ckpt", "a.pt", "--ema-param", "0.9999")


@pytest.mark.parametrize(
    ("cls", "words", "aligned"),
    [
        (TrainConfig, "--model SiT-S/2", False),
        (TrainConfig, "--model SiT-S/2 --enc-type dinov2-vit-b", True),
        (TrainConfig, "--model SiT-S/2 --enc-type mae-vit-l", True),
        (TrainConfig, "--model SiT-S/2 --encoder-depth 4", True),
        (TrainConfig, "--model SiT-S/2 --proj-coeff 0.5", True),
        (TrainConfig, "--model SiT-S/2 --proj-coeff 0", False),
        (TrainConfig, "--model SiT-S/2 --enc-type None", False),
        (TrainConfig, "--model SiT-S/2 --enc-type None --proj-coeff 0.5", False),
        (TrainConfig, "--model SiT-S/2 --enc-type None --encoder-depth 4", False),
        (TrainConfig, "--model SiT-S/2 --no-ssl-align --enc-type dinov2-vit-b", False),
        (TrainConfig, "--model SiT-S/2 --ssl-align", True),
        (TrainConfig, "--model SiT-S/2 --df-idxs 6 --enc-type dinov2-vit-b", False),
        (TrainConfig, "--model DeepFlow-S/2 --enc-type dinov2-vit-b", False),
        (TrainConfig, "--model DeepFlow-S/2 --proj-coeff 0.5 --enc-type dinov2-vit-b", False),
        (TrainConfig, "--model DeepFlow-S/2 --enc-type dinov1-vit-b --ssl-align", True),
        (TextTrainConfig, "--model MMDiT-L/2 --enc-type dinov2-vit-b", True),
        (TextTrainConfig, "", False),
    ],
)
def test_what_asks_for_alignment(cls, words, aligned, capsys):
    config = parse_flags(cls, words.split()).resolve()
    assert config.ssl_align is aligned and bool(config.encoders()) is aligned
    silent = aligned or "dinov2" not in words or "--no-ssl-align" in words
    assert ("no alignment" in capsys.readouterr().err) is not silent
    assert config.resolve() == config


def test_a_resumed_run_stays_as_it_was(tmp_path):
    """Settings of older runs name an encoder, aligned or not."""
    data = tiny.data_folder(tmp_path / "data")
    flags = {"model": "SiT-Ti/2", "df_idxs": "[]", "trans_depth": 2}
    run_dir = tiny.run_train(data, tmp_path / "exps", max_train_steps=1, **flags)
    tiny.run_train(data, tmp_path / "exps", max_train_steps=2, resume="latest", **flags)
    assert "loss_proj" not in tiny.log_lines(run_dir)[-1]


def test_unknown_flags_are_refused_with_the_closest_one():
    assert "did you mean --learning-rate?" in refusal(TrainConfig, "--learning-rat", "1")
    assert "did you mean --no-compile?" in refusal(TrainConfig, "--no-compil")
    assert "--help" in refusal(GenerateConfig, "--ckpt", "a.pt", "--zzzz")
    for cls, typed, meant in [
        (GenerateConfig, "--batch-siz", "--per-proc-batch-size"),
        (GenerateConfig, "--allow-tf3", "--tf32"),
        (GenerateConfig, "--see", "--global-seed"),
        (TrainConfig, "--ema", "--ema-decay"),
        (TrainConfig, "--pretraine", "--init-from"),
        (TrainConfig, "--image-siz", "--resolution"),
        (TrainConfig, "--global_batch_siz", "--batch-size"),
        (dataset_tools.COMMANDS["encode"][0], "--model-ur", "--vae"),
    ]:
        assert f"did you mean {meant}?" in refusal(cls, typed, "1")
    with pytest.raises(InputError, match=r"--resolutio is unknown; did you mean --resolution\?"):
        parse_commands({n: cls for n, (cls, _) in dataset_tools.COMMANDS.items()}, ["convert", "--resolutio", "8x8"])


def test_resuming_a_published_file_says_who_resumes_and_what_reads_it(tmp_path):
    data, path = tiny.data_folder(tmp_path / "data"), tmp_path / "published.pt"
    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(4)}, "args": {"model": "SiT-XL/2"}}, path)
    with pytest.raises(InputError, match=r"published.pt.*checkpoints of this repository.*--init-from"):
        tiny.run_train(data, tmp_path / "exps", resume=path)


@pytest.mark.parametrize("source", ["vae-sd.zip", "."])
def test_a_zip_of_moments_is_refused_as_one(tmp_path, source):
    with zipfile.ZipFile(tmp_path / "vae-sd.zip", "w") as file:
        file.writestr("00000/img-mean-std-00000000.npy", b"")
    with pytest.raises(InputError, match=r"--source .*vae-sd.zip is a zip; unpack"):
        dataset_tools.main(["pack", "--source", str(tmp_path / source), "--dest", str(tmp_path / "packed")])
    assert not (tmp_path / "packed").exists()
    with pytest.raises(InputError, match=r"--data-dir .*vae-sd.zip is a zip; unpack"):
        open_dataset(tmp_path / source)


def test_a_zip_beside_the_unpacked_moments_does_no_harm(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    (data / "vae-sd.zip").touch()
    assert open_dataset(data).info.count == 12
    dataset_tools.main(["pack", "--source", str(data), "--dest", str(tmp_path / "packed")])


def test_commands_of_the_page_are_understood():
    classes = {"train.py": TrainConfig, "train_dmf.py": FlowMapConfig, "generate.py": GenerateConfig}
    text = (tiny.ROOT / "docs/coming_from.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:torchrun|accelerate|python)\b.*?(\w+\.py) (.*)$", text, re.MULTILINE)
    assert len(lines) == 9
    for program, words in lines:
        dry = ["--dry-run"] if program.startswith("train") else []
        config = parse_flags(classes[program], shlex.split(words) + dry).resolve()
        if dry:
            config.check()


def test_other_programs_know_nothing_of_training_and_sampling(capsys):
    for cls, words in [
        (PlotFlags, "--legacy exps/s1"),
        (PlotFlags, "--ckpt x"),
        (CalcFlags, "--ckpt x --images a --ref b"),
        (TrainConfig, "--legacy --model SiT-S/2"),
    ]:
        assert " is unknown; " in refusal(cls, *words.split())
    assert capsys.readouterr().err == ""
    config = parse_flags(CalcFlags, "--images a --workers 2 --ref b".split())
    assert (config.images, config.ref) == ("a", "b") and "--workers is unused" in capsys.readouterr().err
    assert parse_flags(PlotFlags, ["SDE"]).runs == ["SDE"]


def test_a_flag_without_a_value_swallows_none():
    assert "unrecognized arguments: x" in refusal(GenerateConfig, "--ckpt", "a.pt", "--legacy", "x")
    assert "unrecognized arguments: x" in refusal(GenerateConfig, "--ckpt", "a.pt", "--encoder-depth=8", "x")


def test_tables_name_flags_that_exist():
    kinds = {TRAINING: (TrainConfig, FlowMapConfig), SAMPLING: (GenerateConfig,), MEASURING: (CalcFlags,)}
    taken = {kind: {shown(f.name) for cls in kinds[kind] for f in dataclasses.fields(cls)} for kind in kinds}
    assert {ours.partition("=")[0] for ours in OURS.values()} <= taken[TRAINING] | taken[SAMPLING]
    for table in (UNUSED, REFUSED):
        for kind, texts in table.items():
            named = {word.strip(",;") for text in texts.values() for word in text.split() if word.startswith("--")}
            assert {kind, *named} <= taken[kind]

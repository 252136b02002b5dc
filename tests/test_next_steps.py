"""The next command that programs print is one that its program accepts."""

import re
import shlex
from pathlib import Path

import captioned
import pytest
import tiny
from data_helpers import tiny_vae, write_class_folders

from common.flags import parse_commands, parse_flags
from digits import captions, data
from evaluations import count_flops
from evaluations.evaluator import EvaluatorFlags
from models import export
from preprocessing import dataset_tools
from sampling.flags import GenerateConfig, TextGenerateConfig
from training.config import FlowMapConfig, TextTrainConfig, TrainConfig

PROGRAMS = {
    "train.py": TrainConfig,
    "train_dmf.py": FlowMapConfig,
    "train_t2i.py": TextTrainConfig,
    "generate.py": GenerateConfig,
    "generate_t2i.py": TextGenerateConfig,
    "evaluations.evaluator": EvaluatorFlags,
}
TOOLS = {name: cls for name, (cls, _) in dataset_tools.COMMANDS.items()}


def next_command(printed):
    """(program, its parsed flags) of the last line `next: …`."""
    words = shlex.split(re.findall("^next: python (?:-m )?(.*)$", printed, re.MULTILINE)[-1])
    if words[0] == "preprocessing.dataset_tools":
        return parse_commands(TOOLS, words[1:])
    return words[0], parse_flags(PROGRAMS[words[0]], words[1:])


def test_preprocessing_leads_from_images_to_training(tmp_path, capsys):
    source, data = write_class_folders(tmp_path / "source"), tmp_path / "data"
    crop = ["--resolution", "16x16", "--num-workers", "1"]
    dataset_tools.main(["convert", "--source", str(source), "--dest", str(data / "images"), *crop])
    name, options = next_command(capsys.readouterr().err)
    assert (name, options.source, options.dest) == ("encode", str(data / "images"), str(data / "vae-sd"))
    dataset_tools.main(["encode", "--source", options.source, "--dest", options.dest, "--vae", str(tiny_vae())])
    assert next_command(capsys.readouterr().err)[1].data_dir == str(data)
    dataset_tools.main(["pack", "--source", str(data), "--dest", str(tmp_path / "packed")])
    assert next_command(capsys.readouterr().err)[1].data_dir == str(tmp_path / "packed")
    dataset_tools.main(["verify", str(data)])
    assert next_command(capsys.readouterr().err)[1].data_dir == str(data)
    dataset_tools.main(["info", str(data / "vae-sd")])
    assert next_command(capsys.readouterr().err)[1].data_dir == str(data)


def test_checked_images_lead_to_encoding_and_checked_captions_to_text_to_image_training(tmp_path, capsys):
    images, text = tmp_path / "images", captioned.data_folder(tmp_path / "captions")
    crop = ["--resolution", "16x16", "--num-workers", "1"]
    dataset_tools.main(["convert", "--source", str(write_class_folders(tmp_path / "s")), "--dest", str(images), *crop])
    dataset_tools.main(["verify", str(tmp_path)])
    name, options = next_command(capsys.readouterr().err)
    assert (name, options.source) == ("encode", str(images))
    dataset_tools.main(["info", str(text)])
    name, options = next_command(capsys.readouterr().err)
    assert (name, options.data_dir) == ("train_t2i.py", str(text))


@pytest.mark.parametrize("name", dataset_tools.NEXT)
def test_the_next_command_of_every_preprocessing_command_is_valid(name):
    values = {"source": "s", "dest": "data/x", "data_dir": "data", "enc_type": "dinov2-vit-b", "annotations": "a"}
    fields = TOOLS[name].__dataclass_fields__
    options = TOOLS[name](**{key: value for key, value in values.items() if key in fields})
    next_command(f"next: {dataset_tools.next_command(name, options)}")


def test_training_leads_to_sampling_and_that_to_measuring(tmp_path, capsys):
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    run = tiny.run_train(tiny.data_folder(tmp_path / "data"), tmp_path, max_train_steps=1, vae=vae)
    program, options = next_command(capsys.readouterr().out)
    assert (program, options.ckpt) == ("generate.py", str(run))
    tiny.run_generate_only(run, tmp_path / "samples", num_steps=1, vae=vae)
    program, options = next_command(capsys.readouterr().out)
    assert program == "evaluations.evaluator" and options.samples.endswith("-seed-0.npz")
    tiny.run_generate_only(run, tmp_path / "samples", num_steps=1, vae=vae)
    assert "next:" not in capsys.readouterr().out  # finished before: one line


def test_an_export_leads_to_the_program_and_weights_that_it_holds(tmp_path, capsys):
    text, folder = captioned.checkpoint(tmp_path / "t2i.pt", tmp_path), str(tmp_path / "out")
    export.main([str(text), folder, "--weights", "raw"])
    program, options = next_command(capsys.readouterr().out)
    assert (program, options.ckpt, options.weights) == ("generate_t2i.py", folder, "raw")


@pytest.mark.parametrize(
    "model, program",
    {"SiT-S/2": "train.py", "DMFT-S/2": "train_dmf.py", "DeepFlow-MMDiT-S/2": "train_t2i.py"}.items(),
)
def test_counting_a_model_leads_to_a_dry_run_of_its_training(model, program, capsys):
    count_flops.main([model, "--trans-depth", "10"])
    name, options = next_command(capsys.readouterr().err)
    assert (name, options.model, options.trans_depth, options.dry_run) == (program, model, 10, True)
    options.resolve().check()


def test_the_digits_lead_to_preprocessing(tmp_path, capsys):
    data.main(["--dest", str(tmp_path / "digits")])
    name, options = next_command(capsys.readouterr().out)
    assert (name, options.source) == ("convert", str(tmp_path / "digits"))
    captions.main(["--digits", str(tmp_path / "digits"), "--dest", str(tmp_path / "words")])
    name, options = next_command(capsys.readouterr().out)
    assert name == "captions" and Path(options.annotations).exists() and Path(options.text_encoder).is_dir()


def test_a_dry_run_leads_to_the_run(tmp_path, capsys):
    tiny.run_train(tmp_path / "none", tmp_path, dry_run=True)
    assert capsys.readouterr().err.endswith("next: the same command without --dry-run\n")

"""The next command that programs print is one that its program accepts."""

import re
import shlex

import captioned
import pytest
import tiny
from data_helpers import tiny_vae, write_class_folders

from common.flags import parse_commands, parse_flags
from evaluations.evaluator import EvaluatorFlags
from models import export
from preprocessing import dataset_tools
from sampling.flags import GenerateConfig, TextGenerateConfig
from training.config import TextTrainConfig, TrainConfig

PROGRAMS = {
    "train.py": TrainConfig,
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


def test_an_export_leads_to_the_program_and_weights_that_it_holds(tmp_path, capsys):
    text, folder = captioned.checkpoint(tmp_path / "t2i.pt", tmp_path), str(tmp_path / "out")
    export.main([str(text), folder, "--weights", "raw"])
    program, options = next_command(capsys.readouterr().out)
    assert (program, options.ckpt, options.weights) == ("generate_t2i.py", folder, "raw")

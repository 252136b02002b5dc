"""Every training recipe of script/ runs one step on tiny data, and its eval recipe samples from it: thin_program.py.

Stand-ins for srun and python hand what the recipes start to this process, which runs it in a fork.
"""

import dataclasses
import os
import subprocess
import time
from pathlib import Path

import captioned
import numpy as np
import programs
import pytest
import thin_program
import tiny
from evaluation_helpers import pictures, save_npz, script
from PIL import Image

from evaluations import calculate_metrics
from models.encoders import ENCODERS

STUB = """#!/usr/bin/env bash
mkfifo "$QUEUE/$$.code"
printf '%s\\0' "$@" > "$QUEUE/$$.part" && mv "$QUEUE/$$.part" "$QUEUE/$$.call"
read -r code < "$QUEUE/$$.code"
rm "$QUEUE/$$.code"
exit "$code"
"""
STEP = tiny.flags(batch_size=2, max_train_steps=1, sampling_steps=0, num_workers=0, compile=False)
SAMPLE = tiny.flags(num_steps=2, per_proc_batch_size=4, compile=False)
SIDE = 8 * tiny.SIZE  # of the images
RECIPES = {path.relative_to(tiny.ROOT / "script").as_posix() for path in tiny.ROOT.glob("script/*/train*.sh")}


@dataclasses.dataclass
class Desk:
    """The folder in which recipes run."""

    folder: Path
    features: str  # TorchScript file

    def run(self, recipe, *flags, **environment):
        """Run a recipe to its end; returns what it said."""
        values = {"QUEUE": self.folder, "OUTPUT_DIR": self.folder, "RESULTS": self.folder, "NUM_GPUS": 1, **environment}
        env = {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        env |= {name: str(value) for name, value in values.items()}
        output = self.folder / "output"
        with open(output, "w") as file:
            command = ["bash", f"script/{recipe}", *map(str, flags)]
            process = subprocess.Popen(command, cwd=tiny.ROOT, env=env, stdout=file, stderr=file)
            try:
                while process.poll() is None:
                    for call in self.folder.glob("*.call"):
                        self.answer(call, file)
                    time.sleep(0.02)
            finally:
                process.kill()
        said = output.read_text()
        assert process.returncode == 0, said
        return said

    def answer(self, call, output):
        """Run what a stand-in was called with and tell it the exit code."""
        words = call.read_text().removeprefix("-m\0common.launch\0").split("\0")[:-1]
        first = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = words[first:]
        if words[0].startswith("train"):
            words = ["tests/thin_program.py", *words]
        elif "calc" in words:
            words += ["--metrics", "", "--features", self.features]
        elif "evaluations.evaluator" in words:
            words += ["--features", self.features]
        done = programs.run(*words)
        output.write(done.stdout + done.stderr)
        output.flush()
        call.unlink()
        call.with_suffix(".code").write_text(f"{done.returncode}\n")  # a pipe


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A Desk with stand-ins, latents of 64² images, the images, an encoder's file, a reference for each evaluator."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "bin").mkdir()
    for name in ("srun", "python", "scontrol"):
        (folder / "bin" / name).write_text("#!/bin/sh\necho localhost\n" if name == "scontrol" else STUB)
        (folder / "bin" / name).chmod(0o755)
    vae = tiny.vae_folder(folder / "vae", blocks=4)
    spec = dataclasses.replace(tiny.SPEC, vae=str(vae), family="vae", factor=8)
    data = tiny.data_folder(folder / "data", 4, spec)
    (data / "images").mkdir()
    for number, pixels in enumerate(pictures(4, 0, SIDE)):
        Image.fromarray(pixels).save(data / "images" / f"img{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, thin_program.ENCODER, ENCODERS[thin_program.ENCODER])
        thin_program.thin_encoder()
        tiny.encoder_file(thin_program.ENCODER, folder)
    features = script(folder / "corners.pt")
    save_npz(folder / "ref.npz", pictures(6, 1, SIDE))
    named = ["--data", str(folder / "ref.npz"), "--dest", str(folder / "ref.pkl"), "--features", features]
    calculate_metrics.main(["ref", "--metrics", "", *named])
    return Desk(folder, features)


def train(desk, recipe, name, *flags, **environment):
    """One step of a recipe under EXP_NAME `name`; returns the checkpoint."""
    desk.run(recipe, *STEP, *flags, **{"DATA_DIR": desk.folder / "data", "EXP_NAME": name, **environment})
    return desk.folder / name / "checkpoints/0000001.pt"


def evaluate(desk, recipe, ckpt, *flags, **environment):
    """Sample from a checkpoint by an eval recipe; returns what it said."""
    own = {"CKPT": ckpt, "EXP_NAME": ckpt.parent.parent.name, "REF": "none", "NUM_FID_SAMPLES": 4, **environment}
    return desk.run(recipe, *SAMPLE, *flags, **own)


ALIGNED = ("--ssl-align", "--enc-ckpt", f"{{folder}}/{thin_program.ENCODER}-0.pth")
TASK = {"SLURM_SUBMIT_DIR": tiny.ROOT, "SLURM_NTASKS": 1, "SLURM_JOB_NODELIST": "localhost"}
FLOW = {  # name: recipe, more flags, environment, (depth, key layers), eval recipe where there is one
    "b": ("base/train.sh", (), {}, (4, (2,)), "base/eval.sh"),
    "b-sit": ("base/train.sh", ("--model", "SiT-B/2"), {}, (4, ()), "base/eval.sh"),
    "l-edited": ("large/train.sh", ("--df-idxs", "1,2,4"), {}, (6, (1, 2, 4)), "large/eval.sh"),
    "xl-aligned": ("xlarge/train.sh", ALIGNED, {}, (6, (2, 4)), "xlarge/eval.sh"),
    "xl-512": ("xlarge/train_512.sh", ("--resolution", SIDE), {}, (6, (2, 4)), "xlarge/eval.sh"),
    "sit": ("sit/train.sh", ("--weighting", "uniform"), {"SIZE": "B"}, (4, ()), "base/eval.sh"),
    "slurm": ("slurm/train.sh", (), TASK, (6, (2, 4)), None),
}
MAPS = ("b", "xl", "xl_512")


def test_every_recipe_is_tried():
    others = {f"dmf/train_{name}.sh" for name in MAPS} | {"dmf/train_flow.sh", "t2i/train.sh"}
    assert {recipe for recipe, *_ in FLOW.values()} | others == RECIPES


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOW)
def test_flow_models(desk, name):
    recipe, flags, own, expected, measured_by = FLOW[name]
    ckpt = train(desk, recipe, name, *(str(flag).format(folder=desk.folder) for flag in flags), **own)
    options = tiny.load(ckpt)["config"]["model_options"]
    assert (options["depth"], tuple(options["df_idxs"])) == expected
    if measured_by is None:
        return
    said = evaluate(desk, measured_by, ckpt, REF=desk.folder / "ref.npz" if name == "b" else "none")
    assert f"| {name}-" in said if name == "b" else "is not measured" in said
    (npz,) = ckpt.parent.parent.glob("fid/*.npz")
    assert np.load(npz)["arr_0"].shape == (4, SIDE, SIDE, 3)


@pytest.fixture(scope="module")
def flow_models(desk):
    """{size: checkpoint} of the recipe that makes them; B's without alignment."""
    small, aligned = ("--resolution", SIDE), [flag.format(folder=desk.folder) for flag in ALIGNED]
    return {
        "b": train(desk, "dmf/train_flow.sh", "start-b", *small, "--no-ssl-align", "--enc-type", "None", SIZE="B"),
        "xl": train(desk, "dmf/train_flow.sh", "start-xl", *small, *aligned, RESOLUTION=512),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_flow_maps_from_the_recipe_of_their_flow_model(desk, flow_models, name):
    flow = flow_models[name.partition("_")[0]]
    ckpt = train(desk, f"dmf/train_{name}.sh", f"map-{name}", "--resolution", SIDE, CKPT=flow)
    assert bool(tiny.load(ckpt)["config"]["model_options"]["qk_norm"]) == (name == "xl_512")
    own = {"CKPT": ckpt, "EXP_NAME": f"map-{name}", "NUM_FID_SAMPLES": 4}
    measured = {"STEPS": "1 2", "REF": desk.folder / "ref.pkl"} if name == "xl" else {"STEPS": "2", "REF": "none"}
    said = desk.run(f"dmf/eval_{name}.sh", "--no-compile", **own, **measured)
    results = list(desk.folder.glob(f"map-{name}-*-steps-?.json"))
    assert len(results) == said.count("fd_corners = ") == (2 if name == "xl" else 0)
    assert len(list(ckpt.parent.parent.glob("fid-steps-?/*.npz"))) == len(measured["STEPS"].split())


@pytest.mark.slow
def test_text_to_image(desk):
    data = captioned.data_folder(desk.folder / "coco")
    ckpt = train(desk, "t2i/train.sh", "t2i", DATA_DIR=data)
    train(desk, "t2i/train.sh", "mmdit", DATA_DIR=data, MODEL="MMDiT-L/2")
    evaluate(desk, "t2i/eval.sh", ckpt, NUM_FID_SAMPLES=3, VAL_JSON=desk.folder / "coco/captions.json")
    (npz,) = ckpt.parent.parent.glob("samples-t2i/coco/*.npz")
    assert len(np.load(npz)["arr_0"]) == 3

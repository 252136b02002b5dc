"""Sampling in Python gives the programs' images and one line for bad input; the small weights give stored numbers."""

import hashlib
import json

import captioned
import numpy as np
import pytest
import tiny
import torch

from common.errors import InputError
from digits.judge import build_report
from models import create_model, load_checkpoint, load_model
from sampling import sample

MAP = {"name": "DeepFlow-DMF-Ti/2", "depth": 2, "df_idxs": (1,), "dmf_depth": 1}
SMALL = tiny.ROOT / "assets/digits-deepflow"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: checkpoint}."""
    folder = tmp_path_factory.mktemp("files")
    vae = tiny.vae_folder(folder / "tiny-vae")
    return {
        "flow": tiny.checkpoint(folder / "flow.pt", vae),
        "flow map": tiny.checkpoint(folder / "map.pt", vae, **MAP),
        "text": captioned.checkpoint(folder / "text.pt", folder),
    }


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("flow", {"mode": "ode", "cfg_scale": 1.5, "guidance_low": 0.2, "heun": True}),
        ("flow", {"ig_scale": 1.5, "branch_gap": -0.1, "decode": False}),
        ("flow map", {"mode": "restart", "shift": 1.5}),
    ],
)
def test_images_are_those_of_generate(files, tmp_path, kind, settings):
    program = {"labels": "2,0,1", "num_fid_samples": 3, "num_steps": 3, "seed": 5, "format": "npz", **settings}
    tiny.run_generate_only(files[kind], tmp_path, **program)
    (npz,) = tmp_path.glob("*.npz")
    (expected,) = np.load(npz).values()
    model, _ = load_model(files[kind])
    images = sample(model, classes=[2, 0, 1], steps=3, seed=5, batch_size=2, **settings)
    assert images.dtype == expected.dtype and np.array_equal(images, expected)


def test_images_are_those_of_generate_t2i(files, tmp_path):
    prompts = ["a cat", "", "two cups"]
    _, expected, _ = captioned.run_generate(files["text"], tmp_path, *prompts, num_steps=2, per_proc_batch_size=2)
    images = sample(load_model(files["text"])[0], prompts=prompts, steps=2, batch_size=2)
    assert np.array_equal(images, expected)


def test_forms_of_a_model_and_of_classes(files):
    loaded = load_model(files["flow"])
    one = sample(loaded[0], classes=2, steps=1)
    assert one.shape == (1, 16, 16, 3) and np.array_equal(sample(loaded, classes=torch.tensor([2]), steps=1), one)
    many = sample(loaded[0], classes=np.array([2, 1]), steps=1)
    assert np.array_equal(sample(loaded[0], classes="2,1", steps=1), many)
    assert np.abs(many[:1].astype(int) - one).max() <= 1  # another batch
    small = load_model(SMALL)[0]
    assert np.array_equal(sample(small, classes=["7", "0"], steps=1), sample(small, classes=[7, 0], steps=1))


def test_the_model_is_used_in_its_current_state(files):
    """With changed weights, in its precision; it stays as it was."""
    model, _ = load_model(files["flow"])
    before = sample(model, classes=[0, 1], steps=2)
    model.bfloat16()
    rounded = sample(model, classes=[0, 1], steps=2)
    assert model.pos_embed.dtype == torch.bfloat16 and not np.array_equal(rounded, before)
    tiny.fill_(model.float(), seed=9)
    assert not np.array_equal(sample(model, classes=[0, 1], steps=2), rounded)


@pytest.mark.parametrize(
    ("kind", "given", "culprit"),
    [
        ("flow", {"classes": [0, 3]}, "classes 0,3: '3' is not a class from 0 to 2"),
        ("flow", {"classes": [0.5]}, "'0.5' is not a class"),
        ("flow", {"classes": []}, "classes is empty"),
        ("flow", {}, "pass classes="),
        ("flow", {"prompts": "a cat"}, "pass classes="),
        ("text", {"classes": 1}, "pass prompts="),
        ("text", {"classes": 1, "prompts": "a cat"}, "pass prompts="),
        ("flow", {"classes": 1, "mode": "SDE"}, "mode SDE is unknown; choose one of sde, ode"),
        ("flow", {"classes": 1, "mode": "euler"}, "mode euler needs a flow map"),
        ("flow", {"classes": 1, "steps": 2.5}, "steps 2.5 is not a number; pass a whole number"),
        ("flow", {"classes": 1, "steps": 0}, "steps 0 is out of range"),
        ("flow", {"classes": 1, "seed": -1}, "seed -1 is out of range"),
        ("flow", {"classes": 1, "cfg_scale": 0.5}, "cfg_scale 0.5"),
        ("flow", {"classes": 1, "exit_branch": 3}, "exit_branch: branch 3 is out of range"),
        ("flow map", {"classes": 1, "exit_branch": 1}, "exit_branch: only the last branch"),
        ("flow", {"classes": 1, "vae": "/nowhere"}, "cannot load the VAE '/nowhere'"),
        ("flow", {"classes": 1, "grid": "2x2"}, "grid is not a setting of sample"),
        ("flow", {"classes": 1, "step": 3}, "step is not a setting of sample(); did you mean steps? choose from"),
    ],
)
def test_bad_input_is_one_line_that_names_the_keyword(files, kind, given, culprit):
    with pytest.raises(InputError) as caught:
        sample(load_model(files[kind]), **given)
    assert culprit in str(caught.value)
    assert "--" not in str(caught.value) and "\n" not in str(caught.value)


def test_models_that_cannot_be_sampled_are_refused(files):
    with pytest.raises(InputError, match="load_model"):
        sample(create_model("DeepFlow-Ti/2"), classes=1)
    with pytest.raises(InputError, match=r"torch\.float64.*model\.float\(\)"):
        sample(load_model(files["flow"])[0].double(), classes=1)


@pytest.mark.parametrize(("kind", "given"), [("flow", {"classes": 1}), ("text", {"prompts": "a cat"})])
def test_guidance_needs_a_null_class(files, tmp_path, kind, given):
    content = tiny.load(files[kind])
    content["config"]["cfg_prob"] = 0.0
    torch.save(content, tmp_path / "a.pt")
    model, _ = load_model(tmp_path / "a.pt")
    assert len(sample(model, **given, steps=1, cfg_scale=1.0)) == 1
    with pytest.raises(InputError, match=f"{tmp_path / 'a.pt'} has no null class.*pass cfg_scale 1"):
        sample(model, **given, cfg_scale=1.5)


def test_names_of_classes_may_have_commas(files, tmp_path):
    content = tiny.load(files["flow"])
    content["data"]["class_names"] = ["owl, great", "robin", "tabby"]
    torch.save(content, tmp_path / "a.pt")
    model, _ = load_model(tmp_path / "a.pt")
    assert np.array_equal(sample(model, ["robin", "owl, great"], steps=1), sample(model, [1, 0], steps=1))


def test_sample_is_imported_on_first_use():
    done = tiny.run_python("-c", "import sys, sampling; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError, match="sampel"):
        from sampling import sampel  # noqa: F401


# ------------------------------------------------------------------------------------------- the small weights


def test_small_weights_are_the_stored_ones_and_small():
    report = json.loads((SMALL / "report.json").read_text())
    assert load_checkpoint(SMALL).weights_sha256() == report["manifest"]["weights_sha256"]
    assert sum(path.stat().st_size for path in SMALL.iterdir()) <= 5e6
    assert "/tmp" not in "".join(path.read_text() for path in SMALL.glob("*.json"))


def test_small_weights_give_the_stored_numbers():
    """A hundred digits as the report says. Over seeds the distance varies by 0.02, the agreement by 3."""
    report = json.loads((SMALL / "report.json").read_text())
    digits, how = np.arange(report["count"]) % 10, report["manifest"]
    images = sample(load_model(SMALL), digits, mode=how["mode"], steps=how["num_steps"], seed=how["global_seed"])
    found = build_report(images, digits)
    assert abs(found["frechet"]["samples"] - report["frechet"]["samples"]) < 0.05
    assert abs(found["agreement"]["samples"]["agree"] - report["agreement"]["samples"]["agree"]) <= 6


def test_small_weights_give_the_same_images_anywhere(tmp_path, monkeypatch):
    """Library and program, in another folder: the checkpoint names its VAE relative to the repository."""
    monkeypatch.chdir(tmp_path)
    tiny.run_generate_only(SMALL, tmp_path / "out", labels="balanced", num_fid_samples=12, per_proc_batch_size=8)
    _, expected, manifest = tiny.results(tmp_path / "out")
    model, _ = load_model(SMALL)
    again = [sample(model, manifest["labels"], steps=4, batch_size=8) for _ in range(2)]
    assert len({hashlib.sha256(images).hexdigest() for images in (expected, *again)}) == 1
    assert np.abs(sample(model, manifest["labels"], steps=4).astype(int) - expected).max() <= 1  # other batches

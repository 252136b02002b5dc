"""Sampling of prompts: what a prompt does, guidance, sources of prompts, GenEval's folders, bad input."""

import functools
import json
import shutil

import captioned
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from common.errors import InputError
from common.flags import parse_flags
from evaluations.geneval import check_layout
from generate_t2i import TextGenerateConfig, generate_prompts
from models.export import export
from models.mmdit import MMDiT
from samplers import Guidance, GuidedVelocity
from sampling.conditions import PromptList, Prompts, read_prompts
from sampling.sampler import ImageSampler


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return captioned.checkpoint(root / "t2i.pt", root)


def sampler(ckpt, **changes):
    values = {"ckpt": ckpt, "prompts": ["a cat", "a cup"], "num_steps": 3, **changes}
    config = parse_flags(TextGenerateConfig, tiny.flags(**values))
    source = read_prompts(config.prompts, config.global_seed)
    config = config.resolve(source)
    return ImageSampler(config, functools.partial(Prompts, source=source), torch.device("cpu"))


def test_defaults():
    config = parse_flags(TextGenerateConfig, ["--ckpt", "x", "--prompts", "a cat"]).resolve(PromptList(["a cat"]))
    config = config.for_model("text")
    assert (config.mode, config.num_steps, config.cfg_scale, config.num_fid_samples) == ("sde", 250, 2.0, 1)


def test_the_prompt_changes_the_image_and_is_in_the_manifest(ckpt, tmp_path):
    _, first, manifest = captioned.run_generate(ckpt, tmp_path / "a", "a cat", "a cup of coffee")
    _, second, _ = captioned.run_generate(ckpt, tmp_path / "b", "a cat", "a rocket")
    assert manifest["labels"] == ["a cat", "a cup of coffee"]
    assert manifest["cfg_scale"] == 2.0
    assert manifest["text"]["width"] == captioned.WIDTH
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


def test_images_do_not_depend_on_the_batch(ckpt, tmp_path):
    _, pairs, _ = captioned.run_generate(ckpt, tmp_path / "a", "a", "b", "c", cfg_scale=1.0)
    _, alone, _ = captioned.run_generate(ckpt, tmp_path / "b", "a", "b", "c", cfg_scale=1.0, per_proc_batch_size=1)
    assert np.abs(pairs.astype(int) - alone.astype(int)).max() <= 1


def test_an_empty_prompt_is_the_unconditional_path(ckpt):
    made = sampler(ckpt, prompts=["a cat", ""])
    conditional, unconditional = made.condition.of([0, 1])
    assert torch.equal(conditional[1], unconditional[1])
    assert not torch.equal(conditional[0], unconditional[0])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.5])
    velocity = made.network(x, t, conditional)
    without = made.network(x, t, unconditional)
    torch.testing.assert_close(velocity[1], without[1])
    assert (velocity[0] - without[0]).abs().max() > 1e-2


def test_guidance_of_one_is_the_conditional_velocity_and_more_is_one_call_of_twice_the_rows(ckpt):
    made = sampler(ckpt)
    y, y_null = made.condition.of([0, 1])
    calls = []

    def network(x, t, condition):
        calls.append(len(x))
        return made.network(x, t, condition)

    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.5)
    plain = GuidedVelocity(network, y, y_null, Guidance(1.0))(x.double(), t)
    assert torch.equal(plain.float(), made.network(x, t.expand(2), y))
    GuidedVelocity(network, y, y_null, Guidance(2.0))(x.double(), t)
    assert calls == [2, 4]


def test_interrupted_sampling_goes_on(ckpt, tmp_path):
    prompts = ["a", "b", "c", "d"]
    folder, whole, _ = captioned.run_generate(ckpt, tmp_path, *prompts)
    (folder / "000001.png").unlink()
    _, again, _ = captioned.run_generate(ckpt, tmp_path, *prompts)
    assert np.array_equal(whole, again)
    with pytest.raises(ValueError, match="unpack"):  # two results
        captioned.run_generate(ckpt, tmp_path, "other", *prompts[1:])
    assert len([*tmp_path.glob("*.npz")]) == 2 and np.array_equal(np.load(f"{folder}.npz")["arr_0"], whole)


def test_a_file_of_prompts(ckpt, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  the façade of a house \n")
    _, images, manifest = captioned.run_generate(ckpt, tmp_path / "s", tmp_path / "p.txt", images_per_prompt=2)
    assert manifest["labels"] == ["a cat"] * 2 + ["the façade of a house"] * 2
    assert not np.array_equal(images[0], images[1])
    assert len(manifest["labels_sha256"]) == 64


def test_captions_of_a_validation_set_one_per_image_in_order(ckpt, tmp_path):
    path = captioned.coco_json(tmp_path / "val.json")
    _, images, manifest = captioned.run_generate(ckpt, tmp_path / "s", path, num_fid_samples=4)
    assert len(images) == 4
    for name, prompt in zip(sorted(captioned.PHOTOS), manifest["labels"], strict=False):
        assert prompt in captioned.PHOTOS[name]
    seeds = {tuple(read_prompts([str(path)], seed).texts) for seed in range(8)}
    assert len(seeds) > 1
    assert seeds == {tuple(read_prompts([str(path)], seed).texts) for seed in range(8)}


def test_a_picture_with_its_prompts(ckpt, tmp_path):
    prompts = {"prompts": ["a cat", "a cup"], "ckpt": ckpt, "num_steps": 2, "grid": "2x2", "out": tmp_path / "g.png"}
    generate_prompts(parse_flags(TextGenerateConfig, tiny.flags(**prompts)))
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.height > picture.width
    assert json.loads((tmp_path / "g.json").read_text())["labels"] == ["a cat", "a cat", "a cup", "a cup"]


def geneval_file(path):
    records = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records


def test_the_layout_of_geneval(ckpt, tmp_path):
    path, records = geneval_file(tmp_path / "evaluation_metadata.jsonl")
    folder, images, manifest = captioned.run_generate(ckpt, tmp_path / "s", path)
    assert len(images) == len(manifest["labels"]) == 8
    for number, record in enumerate(records):
        place = folder / f"{number:05d}"
        assert [json.loads(line) for line in (place / "metadata.jsonl").read_text().splitlines()] == [record]
        assert sorted(p.name for p in (place / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png", "0003.png"]
        with Image.open(place / "samples/0002.png") as picture:
            assert np.array_equal(np.asarray(picture), images[4 * number + 2])
    assert check_layout(folder, path) == []
    (folder / "00001/samples/0003.png").unlink()
    (folder / "00000/metadata.jsonl").unlink()
    shutil.copyfile(folder / "00000/samples/0001.png", folder / "00001/samples/0001.png")
    faults = check_layout(folder, path)
    assert len(faults) == 3 and any("00001/samples/0001.png" in fault for fault in faults)
    leftover = folder / "00001/samples/.0003.png.1.tmp"  # of a process that was killed
    leftover.touch()
    captioned.run_generate(ckpt, tmp_path / "s", path)
    assert check_layout(folder, path) == []
    assert not leftover.exists()
    with pytest.raises(InputError, match="holds finished images"):
        captioned.run_generate(ckpt, tmp_path / "s", path, resume=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "is empty"),
        ("p.txt", b"a caf\xe9", "not UTF-8"),
        ("p.jsonl", b'{"tag": "x"}', "line 1"),
        ("p.jsonl", b"nonsense", "line 1"),
        ("p.json", b"{}", "holds no captions"),
        ("p.json", b'{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}', "holds no captions"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts([str(tmp_path / name)], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_fid_samples": 3}, "--images-per-prompt"),
        ({"images_per_prompt": 0}, "--images-per-prompt"),
        ({"global_seed": -1}, "--global-seed -1"),
        ({"grid": "1x1"}, "no room"),
        ({"text_encoder": "nothing"}, "--text-encoder"),
    ],
)
def test_flags_that_make_no_sense(ckpt, changes, message):
    with pytest.raises(InputError, match=message):
        sampler(ckpt, **changes)


@pytest.mark.parametrize(("name", "sizes", "field"), [("clip", {"width": 64}, "width"), ("other", {}, "family")])
def test_another_text_encoder_is_refused(ckpt, tmp_path, name, sizes, field):
    other = captioned.text_folder(tmp_path / name, **sizes)
    with pytest.raises(InputError, match=f"text encoder mismatch.* has {field} "):
        sampler(ckpt, text_encoder=other)


def test_each_script_names_the_other(ckpt, tmp_path):
    with pytest.raises(InputError, match=r"generate_t2i\.py"):
        tiny.run_generate(ckpt, tmp_path)
    classes = tiny.checkpoint(tmp_path / "c.pt", tiny.vae_folder(tmp_path / "tiny-vae"))
    with pytest.raises(InputError, match=r"generate\.py"):
        sampler(classes)


def test_an_exported_folder_samples_the_same(ckpt, tmp_path):
    export(ckpt, tmp_path / "model")
    _, exported, _ = captioned.run_generate(tmp_path / "model", tmp_path / "a", "a cat")
    _, original, _ = captioned.run_generate(ckpt, tmp_path / "b", "a cat")
    assert np.array_equal(exported, original)
    assert MMDiT.from_pretrained(tmp_path / "model").context_dim == captioned.WIDTH


def test_a_package_that_is_not_installed_is_named_in_one_line(ckpt, tmp_path):
    command = ["generate_t2i.py", "--ckpt", ckpt, "--prompts", "a cat", "--grid", "1x1", "--out", tmp_path / "a.png"]
    done = tiny.run_python("tests/without.py", "transformers", *command)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines()[-1] == (
        "error: the package transformers is not installed; pip install -r requirements.txt"
    )

"""What generate*.py find: finished work is read, not believed, and what is missing is noticed before sampling."""

import json
import shutil

import captioned
import numpy as np
import pytest
import tiny
from PIL import Image

from common.errors import InputError
from sampling.sampler import ImageSampler


class Stop(BaseException):
    """What a test raises in the middle of things."""


# ---------------------------------------------------------------------------------------- finished work


def truncate(npz):
    npz.write_bytes(npz.read_bytes()[:-100])


def zero(npz):
    npz.write_bytes(bytes(npz.stat().st_size))


def blacken(npz):
    np.savez(npz, arr_0=np.zeros_like(np.load(npz)["arr_0"]))


def shorten(npz):
    np.savez(npz, arr_0=np.load(npz)["arr_0"][:4])


def replace_by_text(npz):
    npz.write_text("not an npz")


@pytest.mark.parametrize("damage", [truncate, zero, blacken, shorten, replace_by_text])
def test_an_npz_that_is_not_what_its_manifest_says_is_made_again(
    reference, ckpt, tmp_path, monkeypatch, capsys, damage
):
    folder, _, manifest = tiny.run_generate(ckpt, tmp_path, format="npz")
    npz = folder.with_name(folder.name + ".npz")
    damage(npz)
    rows = tiny.count_calls(monkeypatch)
    _, array, again = tiny.run_generate(ckpt, tmp_path, format="npz")
    assert sum(rows) == 4 * 5 and np.array_equal(array, reference[1]) and again == manifest
    assert f"{npz} is damaged" in capsys.readouterr().err


def forget_seals(folder):
    """Make a result look as earlier versions left it."""
    record, settings = folder.with_name(folder.name + ".json"), folder / "settings.json"
    for path in (record, settings):
        if path.exists():
            content = json.loads(path.read_text())
            path.write_text(json.dumps({key: content[key] for key in content if key not in ("npz_sha256", "sealed")}))
    for path in folder.glob("*.png"):
        Image.open(path).save(path)
    for path in folder.glob("rows-*.npy"):
        np.save(path, np.load(path))


@pytest.mark.parametrize("format", ["npz", "both", "png"])
def test_what_earlier_versions_finished_is_not_sampled_again(reference, ckpt, tmp_path, monkeypatch, format):
    tiny.run_generate_only(ckpt, tmp_path, format=format)
    folder = tmp_path / reference[0].name
    forget_seals(folder)
    rows = tiny.count_calls(monkeypatch)
    tiny.run_generate_only(ckpt, tmp_path, format=format)
    assert rows == []
    if format == "npz":
        truncate(folder.with_name(folder.name + ".npz"))
        assert np.array_equal(tiny.run_generate(ckpt, tmp_path, format=format)[1], reference[1])
        assert sum(rows) == 4 * 5


@pytest.mark.parametrize("format", ["npz", "both"])
def test_what_earlier_versions_began_is_gone_on_with(reference, ckpt, tmp_path, monkeypatch, format):
    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(np.lib.format, "write_array_header_1_0", stop)
        tiny.run_generate(ckpt, tmp_path, format=format)
    folder = tmp_path / reference[0].name
    forget_seals(folder)
    (folder / ("rows-00000002-00000004.npy" if format == "npz" else "000003.png")).unlink()
    rows = tiny.count_calls(monkeypatch)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, format=format)[1], reference[1])
    assert sum(rows) == 4 * 2


@pytest.mark.parametrize("format", ["both", "png"])
def test_an_image_of_another_program_is_made_again(reference, ckpt, tmp_path, monkeypatch, format):
    tiny.run_generate_only(ckpt, tmp_path, format=format)
    folder = tmp_path / reference[0].name
    Image.new("RGB", (16, 16)).save(folder / "000001.png")
    shutil.copyfile(folder / "000004.png", folder / "000000.png")
    rows = tiny.count_calls(monkeypatch)
    tiny.run_generate_only(ckpt, tmp_path, format=format)
    assert rows == [2] * 4 and tiny.file_bytes(folder) == tiny.file_bytes(reference[0])
    if format == "both":
        assert np.array_equal(tiny.results(tmp_path)[1], reference[1])


def test_a_manifest_that_cannot_be_read_is_named_with_a_remedy(ckpt, tmp_path):
    folder, _, _ = tiny.run_generate(ckpt, tmp_path, format="npz")
    record = folder.with_name(folder.name + ".json")
    record.write_text("{")
    with pytest.raises(InputError, match=f"{record}.*delete it"):
        tiny.run_generate(ckpt, tmp_path, format="npz")


# ------------------------------------------------------------------------------- before the first batch


@pytest.fixture
def no_sampling(monkeypatch):
    """Fail where a batch is computed."""
    monkeypatch.setattr(ImageSampler, "latents", lambda *_: pytest.fail("a batch is computed"))


@pytest.mark.parametrize(
    ("blocked", "changes"),
    [
        ("NAME.npz", {}),
        ("NAME.json", {}),
        ("NAME/000004.png", {}),
        ("NAME/settings.json", {}),
        ("NAME/rows-00000002-00000004.npy", {"format": "npz"}),
        ("grid.png", {"grid": "1x1"}),
        ("grid.json", {"grid": "1x1"}),
    ],
)
def test_a_folder_where_a_file_is_to_be_written(reference, ckpt, tmp_path, no_sampling, blocked, changes):
    path = tmp_path / blocked.replace("NAME", reference[0].name)
    path.mkdir(parents=True)
    if "grid" in changes:
        changes = {**changes, "out": tmp_path / "grid.png"}
    with pytest.raises((InputError, OSError)) as caught:
        tiny.run_generate_only(ckpt, tmp_path, **changes)
    assert str(path) in str(caught.value) and path.is_dir()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"ckpt": "nowhere.pt"}, "nowhere.pt"),
        ({"vae": "nowhere"}, "--vae"),
        ({"labels": "nowhere.txt"}, "--labels"),
        ({"model": "SiT-B/2"}, "--model"),
        ({"mode": "euler"}, "--mode"),
        ({"cfg_scale": 2.0, "guidance_low": 0.1, "guidance_high": 0.11}, "--guidance-low"),
    ],
)
def test_an_input_that_is_missing_or_does_not_fit(ckpt, tmp_path, no_sampling, changes, culprit):
    with pytest.raises(InputError, match=culprit):
        tiny.run_generate_only(**{"ckpt": ckpt, "sample_dir": tmp_path, **changes})


@pytest.fixture(scope="module")
def text_ckpt(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return captioned.checkpoint(root / "t2i.pt", root)


@pytest.mark.parametrize(
    ("changes", "culprit"), [({"vae": "nowhere"}, "--vae"), ({"text_encoder": "nowhere"}, "--text-encoder")]
)
def test_an_input_of_prompts_that_is_missing(text_ckpt, tmp_path, no_sampling, changes, culprit):
    with pytest.raises(InputError, match=culprit):
        captioned.run_generate(text_ckpt, tmp_path, "a cat", **changes)


def test_prompts_that_are_missing(text_ckpt, tmp_path, no_sampling):
    with pytest.raises(InputError, match=r"--prompts .*nowhere\.txt"):
        captioned.run_generate(text_ckpt, tmp_path, tmp_path / "nowhere.txt")


@pytest.mark.parametrize("blocked", ["00001", "00001/metadata.jsonl"])
def test_a_folder_of_geneval_that_cannot_be_written(text_ckpt, tmp_path, monkeypatch, no_sampling, blocked):
    """Without the check it would be noticed with the images of the last prompt."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(pytest.fail.Exception):
        captioned.run_generate(text_ckpt, tmp_path / "s", prompts)
    (folder,) = (path for path in (tmp_path / "s").iterdir() if path.is_dir())
    shutil.rmtree(folder / "00001")
    if blocked == "00001":
        (folder / blocked).touch()
    else:
        (folder / blocked).mkdir(parents=True)
    with pytest.raises(OSError, match=blocked):
        captioned.run_generate(text_ckpt, tmp_path / "s", prompts)

"""Training on a folder of images, which are encoded on first use."""

import threading
import time
from pathlib import Path

import programs
import pytest
import tiny
from data_helpers import tiny_vae, write_class_folders, write_images

from common.errors import InputError
from common.files import locked
from common.flags import parse_flags
from dataset import open_dataset
from preprocessing import direct
from training.config import TrainConfig


@pytest.fixture
def pictures(tmp_path):
    return write_class_folders(tmp_path / "pictures")


def options(data, **changes):
    return {"data_dir": data, "resolution": 16, "data_vae": tiny_vae(), **changes}


def with_latents(data, **changes):
    return direct.with_latents(parse_flags(TrainConfig, tiny.flags(**options(data, **changes))))


def test_the_latents_lie_beside_the_folder_however_it_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures / "n0000")
    config = with_latents("..")
    assert Path(config.data_dir) == (tmp_path / "pictures-latents-16-random-vae").resolve()
    with locked(Path(config.data_dir), "--data-dir"):  # once they are there, nobody waits for anybody
        assert with_latents("..").data_dir == config.data_dir


def test_a_folder_of_images_is_encoded_once_and_trained_on(pictures, tmp_path, capsys):
    changes = {name: value for name, value in options(pictures).items() if name != "data_dir"}
    run = tiny.run_train(pictures, tmp_path / "exps", max_train_steps=1, **changes)
    data = tmp_path / "pictures-latents-16-random-vae"
    assert tiny.load(run / "checkpoints/0000001.pt")["config"]["data_dir"] == str(data)
    info = open_dataset(data, images=True).info
    assert (info.count, info.num_classes, info.resolution) == (12, 3, 16)
    assert "encoded once" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    tiny.run_train(pictures, tmp_path / "exps", max_train_steps=2, resume="auto", **changes)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert "encoded once" not in capsys.readouterr().err
    assert with_latents(data, resolution=16).data_dir == str(data)


def test_two_processes_train_on_what_the_first_one_encodes(pictures, tmp_path):
    changes = {name: value for name, value in options(pictures).items() if name != "data_dir"}
    flags = tiny.train_flags(pictures, tmp_path / "exps", max_train_steps=1, **changes)
    done = programs.run_ranks(2, tiny.ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("encoded once") == 1 and (tmp_path / "exps/run/checkpoints/0000001.pt").exists()


def test_the_others_wait_for_the_first_process(pictures, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    waiting = threading.Thread(target=with_latents, args=[pictures], daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    monkeypatch.setenv("RANK", "0")
    with_latents(pictures)
    waiting.join(60)
    assert not waiting.is_alive()


def test_images_that_have_changed_are_refused(pictures):
    data = with_latents(pictures).data_dir
    next(pictures.rglob("*.png")).unlink()
    with pytest.raises(InputError, match=rf"--data-dir {pictures} have changed .*delete {data}"):
        with_latents(pictures)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": None}, "--data-dir .* pass --resolution"),
        ({"dry_run": True}, "not encoded yet; run without --dry-run"),
        ({"resolution": 10}, "--data-dir .* cannot be encoded .* power of two"),
    ],
)
def test_mistakes_are_named(pictures, changes, message):
    words = {name: value for name, value in options(pictures, **changes).items() if value is not None}
    with pytest.raises(InputError, match=message):
        direct.with_latents(parse_flags(TrainConfig, tiny.flags(**words)))


def test_many_images_and_images_without_classes_are_refused(pictures, tmp_path, monkeypatch):
    write_images(tmp_path / "flat", ["a.png", "b.png"])
    with pytest.raises(InputError, match=r"--data-dir .*flat: images lie in no class folder"):
        with_latents(tmp_path / "flat")
    monkeypatch.setattr(direct, "MOST", 11)
    with pytest.raises(InputError, match=r"holds 12 images, more than 11; .* convert, then encode"):
        with_latents(pictures)
    assert not list(tmp_path.glob("*-latents-*/*"))


def test_data_folders_and_other_folders_are_left_as_they_are(tmp_path):
    folders = [tiny.data_folder(tmp_path / "data"), tiny.aligned_folder(tmp_path / "aligned"), tmp_path / "none"]
    for folder in [*folders, folders[0] / "vae-sd", tmp_path]:
        assert with_latents(folder).data_dir == str(folder)

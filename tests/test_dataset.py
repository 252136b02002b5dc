"""dataset.py: both layouts, the sampler, the loader, and every mistake a folder can hold."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from data_helpers import SPEC, moments_of, write_folder_layout, write_images

from common.errors import InputError
from dataset import open_dataset
from latents.names import pack_names
from latents.sets import check_labels
from models.specs import LatentSpec
from preprocessing.options import PackFlags
from preprocessing.pack import pack
from training.loader import CopyToGPU, LatentLoader, SeekableSampler

COUNT = 12


@pytest.fixture
def folder(tmp_path):
    return write_folder_layout(tmp_path / "data", COUNT)


@pytest.fixture
def packed(folder, tmp_path):
    """The same data in shards of five rows."""
    pack(PackFlags(folder, tmp_path / "packed", shard_size=5))
    return tmp_path / "packed"


def write_manifest(data, **changes):
    """A manifest and names beside the folder layout, as encode writes them."""
    manifest = {"format": "deepflow-data", "version": 1, "kind": "moments", "layout": "folder", "count": COUNT}
    manifest |= {"latents": SPEC, "num_classes": 3, "class_names": ["a", "b", "c"], **changes}
    (data / "vae-sd/manifest.json").write_text(json.dumps(manifest))
    names = [f"00000/img{i:08d}.png" for i in range(COUNT)]
    (data / "vae-sd/names.txt").write_bytes(pack_names(names))
    return names


# ------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["folder", "packed"])
def test_rows_and_labels_come_back(layout, request):
    data = open_dataset(request.getfixturevalue(layout))
    indices = np.array([11, 0, 4, 5, 5])
    moments, labels, images = data.gather(indices)
    assert labels.dtype == torch.int64 and images is None
    expected = np.stack([moments_of(i) for i in indices])
    np.testing.assert_allclose(moments.numpy(), expected, rtol=2**-11)
    assert labels.tolist() == [i % 3 for i in indices]
    assert len(data) == COUNT and data.labels.tolist() == [i % 3 for i in range(COUNT)]
    assert data.info.moments_shape == (8, 4, 4) and data.info.resolution == 32 and data.info.num_classes == 3
    with pytest.raises(IndexError):
        data.gather([COUNT])


def test_files_with_another_header_are_read_too(folder):
    """Order and precision of a file may differ from the first file's; several threads read at once."""
    names = json.loads((folder / "vae-sd/dataset.json").read_text())["labels"]
    for i, change in ((3, np.asfortranarray), (4, np.float64), (5, np.float16)):
        path = folder / "vae-sd" / names[i][0]
        np.save(path, change(np.load(path)))
    moments, _, _ = open_dataset(folder, workers=8).gather(range(COUNT))
    np.testing.assert_allclose(moments.numpy(), np.stack([moments_of(i) for i in range(COUNT)]), rtol=2**-11)


def test_the_set_itself_can_be_named(folder):
    assert open_dataset(folder / "vae-sd").info == open_dataset(folder).info


def test_without_a_manifest_the_family_is_assumed_and_said(folder, capsys):
    data = open_dataset(folder)
    said = capsys.readouterr().err
    assert data.info.spec == LatentSpec() and "sd-vae-ft at scale 0.18215" in said and "3 (largest label + 1" in said
    assert open_dataset(folder, num_classes=7).info.num_classes == 7


def test_data_vae_overrides_what_is_assumed(folder):
    assert open_dataset(folder, data_vae="mse").info.spec == LatentSpec(vae="stabilityai/sd-vae-ft-mse")


def test_manifest_decides(folder):
    write_manifest(folder)
    info = open_dataset(folder).info
    assert info.spec == LatentSpec(**SPEC) and info.class_names == ("a", "b", "c") and info.resolution == 16
    with pytest.raises(InputError, match="--num-classes 5"):
        open_dataset(folder, num_classes=5)
    with pytest.raises(InputError, match="VAE mismatch"):
        open_dataset(folder, data_vae="ema")


def test_one_class_without_labels_as_published(folder):
    (folder / "vae-sd/dataset.json").write_text('{"labels": null}')
    write_manifest(folder, num_classes=1, class_names=["only"])
    assert open_dataset(folder).labels.tolist() == [0] * COUNT


# --------------------------------------------------------------------------------------------- images and mirror


def test_images_are_paired_by_name_where_a_manifest_gives_it(folder):
    names = write_manifest(folder)
    write_images(folder / "images", [*names, "00000/stray.png"])
    _, _, images = open_dataset(folder, images=True).gather([7, 2])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert images[:, 0, 0, -1].tolist() == [7, 2]


def test_images_are_paired_by_order_without_a_manifest(folder):
    write_images(folder / "images", [f"00000/{name}.png" for name in "abcdefghijkl"], side=32)
    assert open_dataset(folder, images=True).gather([7, 2])[2][:, 0, 0, -1].tolist() == [7, 2]
    write_images(folder / "images", ["00000/0-stray.png"], side=32)
    with pytest.raises(InputError, match=r"13 images for 12 latents"):
        open_dataset(folder, images=True)


@pytest.mark.parametrize("manifest", [False, True])
def test_images_with_other_labels_are_refused_where_nothing_identifies_them(manifest, folder):
    names = [f"00000/img{i:08d}.png" for i in range(COUNT)]
    write_images(folder / "images", names)
    if manifest:
        write_manifest(folder)
    labels, listed = [[name, i % 3] for i, name in enumerate(names)], folder / "images/dataset.json"
    for known in (labels, labels[:5], None):  # what is not listed is not compared
        listed.write_text(json.dumps({"labels": known}))
        open_dataset(folder, images=True)
    listed.write_text(json.dumps({"labels": [*labels[:7], [names[7], 2], *labels[8:]]}))
    with pytest.raises(InputError, match=r"images holds other images or labels than .*vae-sd was made from"):
        open_dataset(folder, images=True)


def test_packed_images_need_known_pairs(packed, folder, tmp_path):
    write_images(packed / "images", ["a.png"])
    with pytest.raises(InputError, match="packed without the images"):
        open_dataset(packed, images=True)
    write_images(folder / "images", [f"{name}.png" for name in "abcdefghijkl"], side=32)
    pack(PackFlags(folder, tmp_path / "again"))
    shutil.copytree(folder / "images", tmp_path / "again/images")
    assert open_dataset(tmp_path / "again", images=True).gather([7, 2])[2][:, 0, 0, -1].tolist() == [7, 2]


def test_mirror_takes_the_other_set_and_flips_the_image(folder):
    names = write_manifest(folder)
    write_images(folder / "images", names)
    shutil.copytree(folder / "vae-sd", folder / "vae-sd-mirror")
    for path in (folder / "vae-sd-mirror").rglob("*.npy"):
        np.save(path, -np.load(path))
    data = open_dataset(folder, images=True, mirror=True)
    moments, _, images = data.gather([3, 3], flip=[False, True])
    np.testing.assert_array_equal(moments[1], -moments[0])
    np.testing.assert_array_equal(images[1], images[0].flip(-1))
    assert images[0, 0, 0].tolist() != images[1, 0, 0].tolist()


def test_loader_flips_as_the_sampler_says(folder):
    write_manifest(folder)
    shutil.copytree(folder / "vae-sd", folder / "vae-sd-mirror")
    for path in (folder / "vae-sd-mirror").rglob("*.npy"):
        np.save(path, -np.load(path))
    sampler = SeekableSampler(COUNT, 6, seed=0)
    flips = np.concatenate([sampler.flips(step) for step in range(40)])
    assert 0.3 < flips.mean() < 0.7 and (flips[:12] != flips[12:24]).any()
    data = open_dataset(folder, mirror=True)
    for batch in LatentLoader(data, sampler, stop_step=4):
        assert (batch.moments[:, 7, 0, 0] < 0).tolist() == sampler.flips(batch.step).tolist()


def test_a_mirror_of_other_images_is_refused(folder):
    write_manifest(folder, images="ours")
    shutil.copytree(folder / "vae-sd", folder / "vae-sd-mirror")
    open_dataset(folder, mirror=True)
    path = folder / "vae-sd-mirror/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": "theirs"}))
    with pytest.raises(InputError, match=r"vae-sd-mirror was made from other images than .*mirror"):
        open_dataset(folder, mirror=True)


# ------------------------------------------------------------------------------------------------------- sampler


def test_sampler_order_is_the_stated_permutation():
    sampler = SeekableSampler(10, 3, seed=5)
    first, second = (np.random.default_rng([5, epoch, 0]).permutation(10) for epoch in (0, 1))
    assert sampler.steps_per_epoch == 3
    batches = [sampler.batch(step) for step in range(6)]
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate([first[:9], second[:9]]))
    assert batches[0].dtype == np.int64


def test_sampler_is_a_pure_function_of_the_step():
    a, b = SeekableSampler(100, 8, seed=1), SeekableSampler(100, 8, seed=1)
    forward = [a.batch(step) for step in range(30)]
    backward = [b.batch(step) for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal(forward, backward)
    forward[0][:] = -1  # a caller's change does not reach the order
    assert (a.batch(0) >= 0).all()
    assert not np.array_equal(a.batch(3), SeekableSampler(100, 8, seed=2).batch(3))


def test_sampler_seeks_far():
    batch = SeekableSampler(1_281_167, 256, seed=0).batch(7_000_003)
    assert len(set(batch.tolist())) == 256


def test_fewer_images_than_a_batch_is_refused():
    with pytest.raises(InputError, match="--batch-size 8: the data holds only 5"):
        SeekableSampler(5, 8, seed=0)


# -------------------------------------------------------------------------------------------------------- loader


class Threads(list):
    """The threads in which a dataset gathers."""

    def __init__(self, data, monkeypatch):
        super().__init__()
        gather = data.gather_step
        monkeypatch.setattr(
            data, "gather_step", lambda *a, **k: [self.append(threading.current_thread()), gather(*a, **k)][1]
        )

    def all_ended(self):
        assert self and threading.current_thread() not in self
        return not any(thread.is_alive() for thread in self)


@pytest.mark.parametrize("layout", ["folder", "packed"])
def test_loader_gives_every_step_in_order_from_any_start(layout, request, monkeypatch):
    data = open_dataset(request.getfixturevalue(layout))
    threads = Threads(data, monkeypatch)
    sampler = SeekableSampler(COUNT, 4, seed=3)
    steps = []
    for batch in LatentLoader(data, sampler, start_step=5, stop_step=11):
        steps.append(batch.step)
        expected = data.gather(sampler.batch(batch.step))
        assert torch.equal(batch.moments, expected[0]) and torch.equal(batch.condition, expected[1])
        assert batch.moments.dtype == {"folder": torch.float32, "packed": torch.float16}[layout]
        noise = torch.zeros(4, 4, 4, 4)
        assert data.info.spec.sample(batch.moments, noise).dtype == torch.float32 and batch.images is None
    assert steps == list(range(5, 11)) and threads.all_ended()
    assert not list(LatentLoader(data, sampler, start_step=12, stop_step=11))  # resumed beyond the last step


def test_batches_that_are_kept_are_never_overwritten(packed):
    data, sampler = open_dataset(packed), SeekableSampler(COUNT, 4, seed=0)
    kept = [batch.moments[1:2, :1] for batch in LatentLoader(data, sampler, stop_step=30)]  # views of dropped batches
    for step, row in enumerate(kept):
        assert row[0, 0, 0, 0].item() == sampler.batch(step)[1]


def test_cold_rows_are_asked_for_ahead_until_nothing_waits_for_the_disk(packed, monkeypatch):
    rows, faults, asked = open_dataset(packed)._moments.rows, iter([0, 0, 0, 0, 0, 1, 1, 1]), []
    monkeypatch.setattr("latents.rows.major_faults", lambda: next(faults))
    monkeypatch.setattr(rows, "_ask_for", lambda indices: asked.append(list(indices)))
    rows._cold = 1
    out = np.empty((2, *rows.shape), rows.dtype)
    for first in range(4):
        rows.gather([first + 1, first], out, [0, 1], None)
        assert out[:, 0, 0, 0].tolist() == [first + 1, first]
    assert asked == [[1, 0], [4, 3]]  # the first, and the one after the third, which waited


def test_ranks_together_see_the_global_batch(packed):
    data, sampler = open_dataset(packed), SeekableSampler(COUNT, 6, seed=0)
    whole = list(LatentLoader(data, sampler, stop_step=3))
    parts = [list(LatentLoader(data, sampler, rows=range(r, 6, 2), stop_step=3)) for r in range(2)]
    for step in range(3):
        for r in range(2):
            assert torch.equal(whole[step].moments[r::2], parts[r][step].moments)


def test_leaving_the_loop_ends_the_thread(packed, monkeypatch):
    data, sampler = open_dataset(packed), SeekableSampler(COUNT, 4, seed=0)
    threads = Threads(data, monkeypatch)
    for _ in LatentLoader(data, sampler):
        break
    assert threads.all_ended()
    with pytest.raises(ZeroDivisionError):
        for _ in LatentLoader(data, sampler):
            _ = 1 // 0
    assert threads.all_ended()


def test_an_error_in_the_thread_reaches_the_consumer(folder, monkeypatch):
    data, sampler = open_dataset(folder), SeekableSampler(COUNT, 12, seed=0)
    threads = Threads(data, monkeypatch)
    (folder / "vae-sd/00000/img-mean-std-00000003.npy").unlink()
    with pytest.raises(InputError, match=r"img-mean-std-00000003\.npy .* encode it again"):
        list(LatentLoader(data, sampler, stop_step=5))
    assert threads.all_ended()


@pytest.mark.gpu
def test_loader_brings_the_same_rows_to_the_gpu(packed):
    data, sampler = open_dataset(packed), SeekableSampler(COUNT, 4, seed=3)
    pairs = zip(
        LatentLoader(data, sampler, stop_step=9), LatentLoader(data, sampler, stop_step=9, device="cuda"), strict=True
    )
    for here, there in pairs:
        assert there.moments.device.type == there.condition.device.type == "cuda"
        assert torch.equal(here.moments, there.moments.cpu()) and torch.equal(here.condition, there.condition.cpu())


def test_the_thread_chooses_its_gpu_before_it_pins_memory(monkeypatch):
    """Memory pinned by a thread on GPU 0 would take up memory there, for every process of the machine."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    copy = CopyToGPU.__new__(CopyToGPU)  # its own constructor needs a GPU
    copy.device = torch.device("cuda", 1)

    def gather(pin):
        calls.append(pin)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        copy.start(gather)
    assert calls == [copy.device, True]


def test_a_packed_set_of_imagenet_size_opens(tmp_path):
    count, rows = 1_281_167, 65536
    shards = []
    for number, start in enumerate(range(0, count, rows)):
        shards.append({"file": f"rows-{number:05d}.bin", "count": min(rows, count - start), "sha256": ""})
        with open(tmp_path / shards[-1]["file"], "wb") as file:
            file.truncate(shards[-1]["count"] * 8 * 32 * 32 * 2)  # sparse: takes no space
    np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
    (tmp_path / "names.txt").write_bytes(b"%-20s\n" % b"name" * count)
    manifest = {"format": "deepflow-data", "version": 1, "kind": "moments", "layout": "packed", "count": count}
    manifest |= {"latents": dataclasses.asdict(LatentSpec()), "num_classes": 1000, "shape": [8, 32, 32]}
    manifest |= {"dtype": "<f2", "shard_size": rows, "shards": shards, "files": {"labels.npy": "", "names.txt": ""}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data = open_dataset(tmp_path)
    batch = next(iter(LatentLoader(data, SeekableSampler(len(data), 256, seed=0))))
    assert batch.moments.shape == (256, 8, 32, 32) and not batch.moments.any()


# -------------------------------------------------------------------------------------------------------- faults


def relabel(data, change):
    path = data / "vae-sd/dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(data, shape):
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, np.zeros(shape, np.float32))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def first_pair(data, place, value):
    relabel(data, lambda content: content["labels"][0].__setitem__(place, value))


def retype(data, dtype):
    path = data / "vae-sd" / FIRST
    np.save(path, np.load(path).astype(dtype))


def to_npz(path):
    array = np.load(path)
    with open(path, "wb") as file:
        np.savez(file, array)


def claim_shape(path):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})


FIRST = "00000/img-mean-std-00000000.npy"
FOLDER_FAULTS = {
    "no folder": (shutil.rmtree, "data does not exist"),
    "empty folder": (lambda d: [shutil.rmtree(d), d.mkdir()], "vae-sd/dataset.json"),
    "no dataset.json": (lambda d: (d / "vae-sd/dataset.json").unlink(), "dataset.json"),
    "no latents": (lambda d: relabel(d, lambda c: c["labels"].clear()), "holds no latents"),
    "broken JSON": (lambda d: cut(d / "vae-sd/dataset.json", 20), "dataset.json .*; prepare it"),
    "null labels": (lambda d: relabel(d, lambda c: c.update(labels=None)), r"dataset.json: labels are missing"),
    "labels key missing": (lambda d: relabel(d, lambda c: c.pop("labels")), "dataset.json: 'labels' .*; prepare it"),
    "text label": (
        lambda d: relabel(d, lambda c: c["labels"][0].__setitem__(1, "cat")),
        "dataset.json: .* is 'cat'.*; prepare it",
    ),
    "negative label": (lambda d: relabel(d, lambda c: c["labels"][0].__setitem__(1, -1)), "label -1 is out of range"),
    "sampled latents": (lambda d: rewrite(d, (4, 4, 4)), r"shape \(4, 4, 4\), not \(8, h, h\): mean and std"),
    "another shape": (lambda d: rewrite(d, (6, 4, 4)), r"shape \(6, 4, 4\)"),
    "batch axis": (lambda d: rewrite(d, (1, 8, 4, 4)), r"shape \(1, 8, 4, 4\)"),
    "whole numbers": (lambda d: retype(d, np.int64), f"{FIRST} holds int64, not float"),
    "complex numbers": (lambda d: retype(d, np.complex64), f"{FIRST} holds complex64, not float"),
    "texts": (lambda d: retype(d, "U7"), f"{FIRST} holds <U7, not float"),
    "an npz": (lambda d: to_npz(d / "vae-sd" / FIRST), f"{FIRST} is an npz"),
    "a shape beyond memory": (lambda d: claim_shape(d / "vae-sd" / FIRST), f"{FIRST} is truncated"),
    "huge label": (
        lambda d: relabel(d, lambda c: c["labels"][0].__setitem__(1, 10**12)),
        "dataset.json: .*1000000000000",
    ),
    "name outside": (
        lambda d: relabel(d, lambda c: c["labels"][0].__setitem__(0, "../x.npy")),
        r"'\.\./x\.npy' leaves",
    ),
    "name from the root": (lambda d: relabel(d, lambda c: c["labels"][0].__setitem__(0, "/x.npy")), "'/x.npy' leaves"),
    "truncated latent": (lambda d: cut(d / "vae-sd" / FIRST, 300), f"{FIRST} is truncated"),
    "empty latent": (lambda d: cut(d / "vae-sd" / FIRST, 0), f"{FIRST} is truncated"),
    "broken manifest": (lambda d: (d / "vae-sd/manifest.json").write_text("{"), "manifest.json .*; restore it"),
    "foreign manifest": (lambda d: (d / "vae-sd/manifest.json").write_text("{}"), "not a manifest of this project"),
    "future manifest": (lambda d: write_manifest(d, version=9), "format version 9"),
    "manifest of features": (lambda d: write_manifest(d, latents=None), "does not say which VAE"),
    "another count": (lambda d: write_manifest(d, count=11), "holds 12 latents, its manifest.json says 11"),
    "label beyond the manifest": (lambda d: write_manifest(d, num_classes=2), "label 2 is out of range for 2 classes"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults_end_in_one_line(fault, folder):
    break_it, message = FOLDER_FAULTS[fault]
    break_it(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vae-sd", "vae-sd-mirror", "images"])
def test_a_set_that_is_filled_again_is_not_read_as_whole(name, folder, tmp_path):
    write_images(folder / "images", [f"{name}.png" for name in "abcdefghijkl"], side=32)
    shutil.copytree(folder / "vae-sd", folder / "vae-sd-mirror")
    (folder / name / ".partial").mkdir()
    with pytest.raises(InputError, match=f"{name} is not finished; run the same"):
        open_dataset(folder, images=True, mirror=True)
    with pytest.raises(InputError, match=f"{name} is not finished; run the same"):
        pack(PackFlags(folder, tmp_path / "packed-again"))


def test_unfinished_set_is_named(tmp_path):
    (tmp_path / "vae-sd/.partial").mkdir(parents=True)
    with pytest.raises(InputError, match="vae-sd is not finished; run the same"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("labels", [[["a.png", 0]], None])
def test_pictures_in_place_of_latents_are_not_called_damaged(labels, tmp_path):
    write_images(tmp_path / "images", ["a.png"])
    (tmp_path / "images/dataset.json").write_text(json.dumps({"labels": labels}))
    for use in (open_dataset, lambda path: pack(PackFlags(path, tmp_path / "packed"))):
        with pytest.raises(InputError, match=r"images .*latents.* prepare it") as caught:
            use(tmp_path / "images")
        assert not any(word in str(caught.value) for word in ("delete", "remove", "truncated", "again"))


def test_a_latent_of_another_type_is_named_when_read(folder):
    np.save(folder / "vae-sd/00001/img-mean-std-00000006.npy", np.zeros((8, 4, 4), np.complex64))
    np.save(folder / "vae-sd/00001/img-mean-std-00000007.npy", np.full((8, 4, 4), 0.5, ">f8"))
    data = open_dataset(folder)
    with pytest.raises(InputError, match=r"00000006\.npy holds complex64"):
        data.gather([6])
    assert (data.gather([7])[0] == 0.5).all()


def test_a_latent_of_another_shape_is_named_when_read(folder):
    np.save(folder / "vae-sd/00001/img-mean-std-00000006.npy", np.zeros((8, 5, 5), np.float32))
    data = open_dataset(folder)
    with pytest.raises(InputError, match=r"00000006\.npy has shape \(8, 5, 5\), the others \(8, 4, 4\)"):
        data.gather([6])


PACKED_FAULTS = {
    "truncated shard": (lambda d: cut(d / "rows-00001.bin", 900), r"rows-00001\.bin has 900 bytes instead of 1280"),
    "missing shard": (lambda d: (d / "rows-00002.bin").unlink(), r"rows-00002\.bin .*; pack or copy it again"),
    "missing labels": (lambda d: (d / "labels.npy").unlink(), r"labels\.npy .*; pack again"),
    "short labels": (lambda d: np.save(d / "labels.npy", np.zeros(3, np.int64)), "not 12 labels"),
    "missing names": (lambda d: (d / "names.txt").unlink(), r"names\.txt .* verify lists"),
    "truncated names": (lambda d: cut(d / "names.txt", 100), r"names\.txt does not hold 12 lines"),
    "incomplete manifest": (lambda d: edit(d, "shard_size"), r"manifest\.json lacks 'shard_size'"),
}


def edit(folder, key):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("fault", PACKED_FAULTS)
def test_packed_faults_end_in_one_line(fault, packed):
    break_it, message = PACKED_FAULTS[fault]
    break_it(packed / "vae-sd")
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(packed)
    assert "\n" not in str(caught.value)


def test_packed_label_out_of_range_is_found_when_opened(packed):
    labels = np.load(packed / "vae-sd/labels.npy")
    labels[4] = 3
    np.save(packed / "vae-sd/labels.npy", labels)
    with pytest.raises(InputError, match=r"labels\.npy: label 3 is out of range for 3 classes"):
        open_dataset(packed)


def test_a_packed_label_that_makes_no_sense_does_not_make_the_number_of_classes(packed):
    np.save(packed / "vae-sd/labels.npy", np.full(COUNT, 10**12))
    edit(packed / "vae-sd", "num_classes")
    with pytest.raises(InputError, match=r"labels\.npy .*1000000000000.*; pack again"):
        open_dataset(packed)


def test_images_that_do_not_fit_are_named(folder):
    names = write_manifest(folder)
    with pytest.raises(InputError, match="images is missing and images are needed"):
        open_dataset(folder, images=True)
    write_images(folder / "images", names)
    write_images(folder / "images", names[:1], side=8)
    cut(folder / "images" / names[1], 60)
    (folder / "images" / names[2]).unlink()
    data = open_dataset(folder, images=True)
    for index, message in [(0, "is 8x8, the latents are of 16x16"), (1, ".* convert again"), (2, ".* convert again")]:
        with pytest.raises(InputError, match=f"img{index:08d}.png {message}"):
            data.gather([index])


def test_check_labels_bounds():
    check_labels(np.array([0, 4]), 5, "x")
    for wrong in (-1, 5):
        with pytest.raises(InputError, match=f"x: label {wrong}"):
            check_labels(np.array([0, wrong]), 5, "x")

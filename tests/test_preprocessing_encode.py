"""encode, mirror, features and pack: the same moments however they are made, whole round trips, every mistake."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import programs
import pytest
import tiny
import torch
from data_helpers import photo, tiny_vae, tree, write_class_folders, write_folder_layout
from PIL import Image

from common.errors import InputError
from common.flags import parse_commands
from common.processes import Processes
from dataset import open_dataset
from latents.sets import open_set
from models.codec import LatentCodec
from preprocessing import dataset_tools
from preprocessing.convert import convert
from preprocessing.encode import encode
from preprocessing.info import describe, write_grid
from preprocessing.options import ConvertFlags, EncodeFlags, MirrorFlags, PackFlags
from preprocessing.pack import pack
from preprocessing.sources import ImageSource
from preprocessing.verify import verify

ROOT = Path(__file__).parent.parent
COUNT = 18


@pytest.fixture
def data(tmp_path):
    """A data folder with 18 converted 16×16 images of three classes."""
    source = write_class_folders(tmp_path / "source", per_class=6)
    convert(ConvertFlags(source, tmp_path / "data/images", (16, 16), "center-crop-dhariwal"))
    return tmp_path / "data"


def all_moments(folder):
    dataset = open_dataset(folder)
    return dataset.gather(range(len(dataset)))[0].float()


def direct_moments(data, flip=False):
    """Moments of every image, one by one and with nothing in between."""
    codec = LatentCodec.load(tiny_vae())
    paths = sorted((data / "images").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    images = torch.from_numpy(images[..., ::-1].copy() if flip else images)
    return torch.cat([codec.encode(images[i : i + 1]) for i in range(len(images))])


def test_moments_do_not_depend_on_the_batch(data, tmp_path):
    expected = direct_moments(data)
    assert expected.std() > 0.1
    for batch_size in (1, 16):
        encode(EncodeFlags(data / "images", tmp_path / f"b{batch_size}", tiny_vae(), batch_size=batch_size))
        moments = all_moments(tmp_path / f"b{batch_size}")
        torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in json.loads((tmp_path / "b16/dataset.json").read_text())["labels"]]
    assert names[17] == "00000/img-mean-std-00000017.npy"
    first = np.load(tmp_path / "b16" / names[0])
    assert first.dtype == np.float32 and first.shape == (8, 4, 4)


def test_packed_is_the_same_within_half_precision(data, tmp_path):
    expected = direct_moments(data)
    encode(EncodeFlags(data / "images", tmp_path / "fp16", tiny_vae(), packed=True, shard_size=7))
    encode(EncodeFlags(data / "images", tmp_path / "fp32", tiny_vae(), packed=True, stored_dtype="fp32", batch_size=5))
    torch.testing.assert_close(all_moments(tmp_path / "fp16"), expected, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(all_moments(tmp_path / "fp32"), expected, rtol=1e-4, atol=1e-5)
    assert sorted(tree(tmp_path / "fp16")) == ["labels.npy", "manifest.json", "names.txt"] + [
        f"rows-{i:05d}.bin" for i in range(3)
    ]
    info = open_dataset(tmp_path / "fp16").info
    assert info == open_dataset(tmp_path / "fp32").info and info.class_names == ("n0000", "n0001", "n0002")


def test_help_says_that_fp32_convolutions_are_in_tf32():
    for command in (EncodeFlags, MirrorFlags):
        (dtype,) = (f for f in dataclasses.fields(command) if f.name == "dtype")
        assert "GPUs convolve fp32 in TF32" in dtype.metadata["help"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_arithmetic_is_close(dtype, data, tmp_path):
    encode(EncodeFlags(data / "images", tmp_path / "half", tiny_vae(), dtype=dtype))
    expected, moments = direct_moments(data), all_moments(tmp_path / "half")
    error = ((moments - expected).square().mean() / expected.square().mean()).sqrt()
    assert 0 < error < 0.03


def test_pack_equals_direct_packing(data, tmp_path):
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny_vae()))
    encode(EncodeFlags(data / "images", tmp_path / "direct", tiny_vae(), packed=True, shard_size=7))
    pack(PackFlags(data, tmp_path / "packed", shard_size=7))
    pack(PackFlags(tmp_path / "packed/vae-sd", tmp_path / "again", shard_size=18))
    files = tree(tmp_path / "direct")
    assert {**tree(tmp_path / "packed/vae-sd"), "manifest.json": files["manifest.json"]} == files
    rows = [(tmp_path / f"direct/rows-{i:05d}.bin").read_bytes() for i in range(3)]
    assert (tmp_path / "again/rows-00000.bin").read_bytes() == b"".join(rows)
    manifest = json.loads((tmp_path / "packed/vae-sd/manifest.json").read_text())
    assert manifest["latents"]["family"] == "random-vae" and manifest["transform"] == "center-crop-dhariwal"
    assert (tmp_path / "direct/names.txt").read_text().split()[17] == "00000/img00000017.png"


def test_pack_of_a_foreign_folder_records_what_is_assumed(tmp_path):
    write_folder_layout(tmp_path / "foreign")
    pack(PackFlags(tmp_path / "foreign", tmp_path / "packed", num_classes=7))
    info = open_dataset(tmp_path / "packed").info
    assert info.num_classes == 7 and info.spec.family == "sd-vae-ft" and info.spec.scale == 0.18215
    with pytest.raises(InputError, match=r"holds another result \(num_classes: 7 there, 5 now\)"):
        pack(PackFlags(tmp_path / "foreign", tmp_path / "packed", num_classes=5))
    (tmp_path / "foreign/vae-sd").rename(tmp_path / "foreign/vae-sd-mirror")
    pack(PackFlags(tmp_path / "foreign", tmp_path / "mirrored", num_classes=7))
    assert open_set(tmp_path / "mirrored/vae-sd-mirror")[0].flipped is True


def test_a_mirror_of_images_that_were_not_flipped_is_refused(data):
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny_vae()))
    encode(EncodeFlags(data / "images", data / "vae-sd-mirror", tiny_vae()))
    with pytest.raises(InputError, match=r"vae-sd-mirror was made without flipping .*mirror"):
        open_dataset(data, mirror=True)


def test_a_data_folder_in_place_of_its_images_is_refused(data):
    with pytest.raises(InputError, match=f"{data} is a data folder; pass its images instead: {data}/images"):
        encode(EncodeFlags(data, data / "vae-sd", tiny_vae()))


def test_a_class_may_be_called_images(tmp_path):
    for name in ("images", "drawings"):
        (tmp_path / name).mkdir()
        photo(0, 16, 16).save(tmp_path / name / "0.png")
    (tmp_path / "images/manifest.json").write_text('{"tool": "another"}')
    assert ImageSource(tmp_path).class_names == ["drawings", "images"]


def test_batches_that_another_process_has_not_recorded_are_not_taken_for_written(data):
    class FirstOfTwo(Processes):
        def barrier(self):
            self.world = 1

    options = EncodeFlags(data / "images", data / "vae-sd", tiny_vae(), batch_size=4)
    first = FirstOfTwo.alone()
    first.world = 2
    with pytest.raises(InputError, match="some batches are not recorded as finished; run the same again"):
        encode(options, first)
    encode(options)
    assert len(open_dataset(data).gather(range(COUNT))[0]) == COUNT


def test_16_bit_images_look_alike_to_alignment_and_encoding(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    (tmp_path / "images/a").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "images/a/0.png")
    encode(EncodeFlags(tmp_path / "images", tmp_path / "vae-sd", tiny_vae()))
    seen = open_dataset(tmp_path, images=True).gather([0])[2][0, 0]
    np.testing.assert_array_equal(seen, (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize("command", ["convert", "pack"])
def test_commands_of_one_process_refuse_torchrun(command, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"{command} must be started without torchrun"):
        dataset_tools.main([command, "--source", str(data / "images"), "--dest", str(data / "x")])


def test_mirror_encodes_flipped_images(data):
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny_vae()))
    encode(MirrorFlags(data / "images", data / "vae-sd-mirror", tiny_vae(), packed=True))
    dataset = open_dataset(data, images=True, mirror=True)
    moments, _, images = dataset.gather(range(COUNT), flip=np.ones(COUNT, bool))
    expected = direct_moments(data, flip=True)
    torch.testing.assert_close(moments.float(), expected, rtol=2**-10, atol=1e-4)
    assert (expected - direct_moments(data)).abs().max() > 0.1
    torch.testing.assert_close(LatentCodec.load(tiny_vae()).encode(images), expected, rtol=1e-4, atol=1e-5)


def class_folders(place, **options):
    return write_class_folders(place, size=(16, 16), **options)


def no_labels(place):
    class_folders(place)
    (place / "dataset.json").write_text('{"labels": null}')


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (class_folders, {}),
        (class_folders, {"max_images": 3, "packed": True}),  # of one class
        (lambda place: class_folders(place, classes=1), {}),
        (no_labels, {"published_labels": True}),
    ],
)
def test_images_that_were_encoded_from_a_folder_are_found_again(make, options, tmp_path):
    make(tmp_path / "images")
    encode(EncodeFlags(tmp_path / "images", tmp_path / "vae-sd", tiny_vae(), **options))
    open_dataset(tmp_path, images=True)


def other_images(images):
    """Images of the same names, sizes and labels."""
    for path in images.rglob("*.png"):
        photo(500, 16, 16).save(path)


def other_class_order(images):
    """What converting the same classes gives if the first is called like the last, and the last like the first."""
    paths = sorted(images.rglob("*.png"))
    for first, last in zip(paths[:6], paths[12:], strict=True):
        first.rename(images / "moved")
        last.rename(first)
        (images / "moved").rename(last)


def other_label(images):
    content = json.loads((images / "dataset.json").read_text())
    content["labels"][0][1] = 1
    (images / "dataset.json").write_text(json.dumps(content))


def fewer_images(images):
    (images / "00000/img00000003.png").unlink()


@pytest.mark.parametrize("change", [other_images, other_class_order, other_label, fewer_images])
def test_images_that_were_not_encoded_are_refused(change, data):
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny_vae(), packed=True))
    assert verify(data).faults == {}
    change(data / "images")
    open_dataset(data)
    message = (
        r"images holds other images or labels than .*vae-sd was made from; put those there, or encode .* new folder"
    )
    with pytest.raises(InputError, match=message):
        open_dataset(data, images=True)
    assert verify(data).faults


def test_images_that_were_left_out_may_be_deleted(data):
    bad = data / "images/00000/img00000003.png"
    bad.write_bytes(b"no image")
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny_vae(), skip_bad=True))
    open_dataset(data, images=True)
    bad.unlink()
    open_dataset(data, images=True)
    other_label(data / "images")
    with pytest.raises(InputError, match="images holds other images or labels"):
        open_dataset(data, images=True)


def test_round_trip_costs_nothing_beyond_the_vae(tmp_path):
    """Image → moments → packed → pixels, against the VAE alone."""
    vae = ROOT / "assets/tiny-vae"
    source = write_class_folders(tmp_path / "source", per_class=3, size=(32, 32))
    convert(ConvertFlags(source, tmp_path / "images", (32, 32), "center-crop-dhariwal"))
    encode(EncodeFlags(tmp_path / "images", tmp_path / "vae-sd", vae))
    pack(PackFlags(tmp_path / "vae-sd", tmp_path / "packed"))
    images = torch.stack(
        [
            torch.from_numpy(np.asarray(Image.open(path)).transpose(2, 0, 1).copy())
            for path in sorted((tmp_path / "images").rglob("*.png"))
        ]
    )
    codec, data = LatentCodec.load(vae), open_dataset(tmp_path / "packed")
    zeros = torch.zeros(len(data), 4, 8, 8)
    alone = codec.decode(codec.spec.sample(codec.encode(images), zeros)).permute(0, 3, 1, 2).float()
    ours = codec.decode(data.info.spec.sample(data.gather(range(len(data)))[0], zeros)).permute(0, 3, 1, 2).float()
    own_error = (alone - images).abs().mean()
    assert (ours - images).abs().mean() < own_error + 0.1
    assert (ours - alone).abs().max() <= 2


def test_a_second_run_does_nothing(data, tmp_path, capsys):
    for folder, options in (("folder", {}), ("packed", {"packed": True})):
        for _ in range(2):
            encode(EncodeFlags(data / "images", tmp_path / folder, tiny_vae(), **options))
        assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"holds another result \(batch_size: 16 there, 8 now\)"):
        encode(EncodeFlags(data / "images", tmp_path / "folder", tiny_vae(), batch_size=8))


def test_a_complete_set_is_recognised_without_torch(data, tmp_path):
    words = ["encode", "--source", data / "images", "--dest", tmp_path / "vae-sd", "--vae", tiny_vae(), "--device=cpu"]
    encode(parse_commands({"encode": EncodeFlags}, list(map(str, words)))[1])
    code = "import sys; from preprocessing import dataset_tools; dataset_tools.main(); sys.exit('torch' in sys.modules)"
    done = tiny.run_python("-c", code, *words)
    assert done.returncode == 0 and "nothing to do" in done.stderr, done.stderr


def test_unreadable_images_are_left_out_without_a_gap(data, tmp_path):
    expected = direct_moments(data)
    (data / "images/00000/img00000005.png").write_bytes(b"")
    (data / "images/00000/img00000017.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"img00000005\.png cannot be read \(the file is empty\)"):
        encode(EncodeFlags(data / "images", tmp_path / "packed", tiny_vae(), packed=True, shard_size=7, batch_size=4))
    kept = [i for i in range(COUNT) if i not in (5, 17)]
    for folder, packed in (("packed", True), ("folder", False)):
        encode(
            EncodeFlags(
                data / "images", tmp_path / folder, tiny_vae(), packed=packed, shard_size=7, batch_size=4, skip_bad=True
            )
        )
        dataset = open_dataset(tmp_path / folder)
        moments, labels, _ = dataset.gather(range(16))
        torch.testing.assert_close(moments.float(), expected[kept], rtol=2**-10, atol=1e-4)
        assert labels.tolist() == [i // 6 for i in kept]
        _, _, _, names = open_set(tmp_path / folder)
        assert [names[i] for i in range(16)] == [f"00000/img{i:08d}.png" for i in kept]
        manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
        assert [name for name, _ in manifest["left_out"]] == ["00000/img00000005.png", "00000/img00000017.png"]
    data.joinpath("vae-sd").symlink_to(tmp_path / "packed")
    assert open_dataset(data, images=True).gather([3])[2].shape == (1, 3, 16, 16)


def test_a_first_image_that_cannot_be_read_is_left_out_too(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2, size=(16, 16))  # no manifest says the size
    first = min(path.relative_to(source).as_posix() for path in source.rglob("*.*"))
    (source / first).write_bytes(b"")
    with pytest.raises(InputError, match=f"{first} cannot be read .*--skip-bad"):
        encode(EncodeFlags(source, tmp_path / "dest", tiny_vae()))
    encode(EncodeFlags(source, tmp_path / "dest", tiny_vae(), skip_bad=True))
    assert json.loads((tmp_path / "dest/manifest.json").read_text())["left_out"] == [[first, "the file is empty"]]
    for path in source.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"--source .*source holds no readable images"):
        encode(EncodeFlags(source, tmp_path / "none", tiny_vae(), skip_bad=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("change", ["repaired", "removed"])
def test_after_images_have_changed_only_their_batches_are_redone(change, packed, tmp_path):
    source = write_class_folders(tmp_path / "source", size=(16, 16))
    places = sorted(source.glob("*/*"))
    bad, content = places[7], places[7].read_bytes()
    bad.write_bytes(b"")
    options = {"batch_size": 3, "packed": packed, "shard_size": 4, "device": "cpu"}
    with pytest.raises(InputError, match=f"{bad.parent.name}/{bad.name} cannot be read"):
        encode(EncodeFlags(source, tmp_path / "dest", tiny_vae(), **options))
    bad.write_bytes(content)
    for path in places[5:] if change == "removed" else ():
        path.unlink()
    if change == "repaired":
        photo(77, 16, 16).save(places[1])
    encode(EncodeFlags(source, tmp_path / "dest", tiny_vae(), **options))
    encode(EncodeFlags(source, tmp_path / "fresh", tiny_vae(), **options))
    assert tree(tmp_path / "dest") == tree(tmp_path / "fresh")


def test_one_class_trains(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1)
    convert(ConvertFlags(source, tmp_path / "data/images", (16, 16), "center-crop-dhariwal"))
    for folder, packed in (("vae-sd", False), ("packed", True)):
        encode(EncodeFlags(tmp_path / "data/images", tmp_path / "data" / folder, tiny_vae(), packed=packed))
        dataset = open_dataset(tmp_path / "data" / folder)
        assert dataset.info.num_classes == 1 and dataset.labels.tolist() == [0] * 4


def test_info_says_ten_lines_and_draws(data, tmp_path):
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny_vae(), packed=True))
    text = "\n".join(describe(data))
    assert len(describe(data)) == 10 and "18" in text and "n0000, n0001, n0002" in text and "random-vae" in text
    write_grid(data, tmp_path / "grid.png", columns=4)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    beside, grid = np.split(grid, [7 * 5 + 6], axis=1)  # n0000, n0001, …
    assert grid.shape == (4 * 66 - 2, 4 * 66 - 2, 3) and all(beside[66 * row :][:64].min() < 128 for row in range(4))
    codec = LatentCodec.load(tiny_vae())
    first = codec.decode(direct_moments(data)[:1, :4])[0].numpy()
    assert abs(grid[:64:4, :64:4].astype(int) - first).max() <= 2


ENCODE_FAULTS = {
    "no source": ({"source": "nowhere"}, "--source .*nowhere is neither a folder nor a .zip"),
    "no VAE": ({"vae": "/no/such/vae"}, "cannot load the VAE"),
}


@pytest.mark.parametrize("fault", ENCODE_FAULTS)
def test_encode_mistakes_end_in_one_line(fault, data, tmp_path):
    change, message = ENCODE_FAULTS[fault]
    with pytest.raises(InputError, match=message) as caught:
        encode(EncodeFlags(**{"source": data / "images", "dest": tmp_path / "dest", "vae": tiny_vae(), **change}))
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_named(data, tmp_path):
    photo(0, 8, 8).save(data / "images/00000/img00000005.png")
    with pytest.raises(InputError, match=r"img00000005\.png is 8x8, not 16x16; convert the images first"):
        encode(EncodeFlags(data / "images", tmp_path / "dest", tiny_vae()))


def test_values_that_half_precision_cannot_hold_are_named(tmp_path):
    write_folder_layout(tmp_path / "data")
    np.save(tmp_path / "data/vae-sd/00000/img-mean-std-00000002.npy", np.full((8, 4, 4), 1e6, np.float32))
    with pytest.raises(InputError, match=r"00000002\.npy gives values that are not finite in float16"):
        pack(PackFlags(tmp_path / "data", tmp_path / "packed"))
    pack(PackFlags(tmp_path / "data", tmp_path / "wide", stored_dtype="fp32"))
    assert open_dataset(tmp_path / "wide").gather([2])[0].max() == 1e6


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(data, tmp_path):
    tool = ["preprocessing/dataset_tools.py", "encode", "--source", data / "images", "--vae", tiny_vae()]
    tool += ["--batch-size", 4, "--packed", "--shard-size", 7, "--device", "cpu"]
    assert programs.run(*tool, "--dest", tmp_path / "one").returncode == 0
    assert programs.run_ranks(2, *tool, "--dest", tmp_path / "two").returncode == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    torch.testing.assert_close(all_moments(tmp_path / "two"), direct_moments(data), rtol=2**-10, atol=1e-4)
    again = programs.run_ranks(2, *tool, "--dest", tmp_path / "two")
    assert again.returncode == 0 and "nothing to do" in again.stderr

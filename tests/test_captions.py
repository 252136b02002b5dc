"""Captions: preparation, both layouts, choice of captions, what does not fit."""

import functools
import json
import shutil
from pathlib import Path

import captioned
import numpy as np
import programs
import pytest
import torch
from data_helpers import tree
from PIL import Image

from common.errors import InputError
from dataset import open_captions
from models.text import TextEncoder, TextSpec, encoder_family
from preprocessing.encode import encode
from preprocessing.info import describe, write_grid
from preprocessing.options import CaptionFlags, EncodeFlags, PackFlags
from preprocessing.pack import pack
from preprocessing.text import Captions, write_captions
from preprocessing.verify import verify
from training.loader import LatentLoader, SeekableSampler


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return captioned.data_folder(tmp_path_factory.mktemp("captions"))


@pytest.fixture
def copy(data, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(data.parent, tmp_path / "copy")
    return tmp_path / "copy/data"


def encoder(data):
    return TextEncoder(data.parent / "clip")


def test_latents_without_labels_are_drawn(data, tmp_path):
    write_grid(data, tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width == picture.height >= 32


def test_every_caption_has_its_features_and_its_text(data):
    dataset = open_captions(data)
    listed = [(i, text) for i, group in enumerate(sorted(captioned.PHOTOS)) for text in captioned.PHOTOS[group]]
    assert dataset.info.captions == captioned.CAPTION_COUNT == len(listed)
    rows = range(len(listed))
    assert [dataset.text.captions[row] for row in rows] == [text for _, text in listed]
    assert [int(np.searchsorted(dataset.text.starts, row, "right")) - 1 for row in rows] == [i for i, _ in listed]
    expected = encoder(data)([text for _, text in listed])
    torch.testing.assert_close(dataset.context(rows).float(), expected, atol=2e-3, rtol=2e-3)  # stored in fp16
    torch.testing.assert_close(dataset.text.empty, encoder(data)([""])[0])


def test_info_of_the_data(data):
    info = open_captions(data).info
    assert info.text == encoder(data).spec
    assert (info.text.family, info.text.tokens, info.text.width) == ("clip", captioned.TOKENS, captioned.WIDTH)
    assert info.model_options() == {"context_dim": captioned.WIDTH, "in_channels": 4, "input_size": 8}
    assert any(f"{captioned.CAPTION_COUNT} captions" in line for line in describe(data / "text"))
    assert verify(data).lines() == []


def test_a_step_draws_one_of_the_images_captions(data):
    dataset, sampler = open_captions(data), SeekableSampler(captioned.COUNT, captioned.COUNT, seed=0)
    seen = {index: set() for index in range(captioned.COUNT)}
    for batch in LatentLoader(dataset, sampler, stop_step=60):
        order = sampler.batch(batch.step)
        chosen = dataset.text.choose(order, sampler.uniforms(batch.step))
        assert torch.equal(batch.condition, dataset.context(chosen))
        for index, row in zip(order.tolist(), chosen.tolist(), strict=True):
            seen[index].add(row)
    starts = dataset.text.starts
    assert seen == {i: set(range(starts[i], starts[i + 1])) for i in range(captioned.COUNT)}


def test_ranks_get_their_rows_of_the_same_choice(data):
    dataset, sampler = open_captions(data), SeekableSampler(captioned.COUNT, 4, seed=3)
    (whole,) = LatentLoader(dataset, sampler, start_step=2, stop_step=3)
    (half,) = LatentLoader(dataset, sampler, rows=[2, 3], start_step=2, stop_step=3)
    assert torch.equal(whole.condition[2:], half.condition)


def test_dropped_captions_become_the_empty_one(data):
    dataset = open_captions(data)
    y, null, texts = dataset.conditions(3)
    dropped = dataset.drop(y, torch.tensor([True, False, True]))
    assert torch.equal(dropped[[0, 2]], null[[0, 2]])
    assert torch.equal(dropped[1], y[1])
    assert len(texts) == 3
    assert all(texts)


@pytest.mark.parametrize("form", ["mapping", "single"])
def test_a_plain_json_of_captions(data, tmp_path, form):
    plain = {name: group if form == "mapping" else group[0] for name, group in captioned.PHOTOS.items()}
    (tmp_path / "c.json").write_text(json.dumps(plain))
    captions = Captions(data / "images", tmp_path / "c.json")
    assert len(captions.texts) == (captioned.CAPTION_COUNT if form == "mapping" else captioned.COUNT)


def test_written_again_gives_the_same_bytes_and_a_second_run_does_nothing(data, tmp_path, capsys):
    arguments = (data / "images", tmp_path / "text", data.parent / "captions.json", data.parent / "clip")
    write_captions(CaptionFlags(*arguments, device="cpu"))
    assert tree(tmp_path / "text") == tree(data / "text")
    write_captions(CaptionFlags(*arguments, device="cpu"))
    assert "nothing to do" in capsys.readouterr().err


def test_features_in_full_precision(data, tmp_path):
    arguments = (data / "images", tmp_path / "text", data.parent / "captions.json", data.parent / "clip")
    write_captions(CaptionFlags(*arguments, batch_size=4, stored_dtype="fp32", device="cpu"))
    rows = np.fromfile(tmp_path / "text/rows-00000.bin", "<f4").reshape(-1, captioned.TOKENS, captioned.WIDTH)
    texts = [text for name in sorted(captioned.PHOTOS) for text in captioned.PHOTOS[name]]
    np.testing.assert_allclose(rows, encoder(data)(texts), atol=1e-6)


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    arguments = (data / "images", tmp_path / "text", data.parent / "captions.json", data.parent / "clip")
    calls, call = [], TextEncoder.__call__

    def dying(self, texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, texts)

    monkeypatch.setattr(TextEncoder, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        write_captions(CaptionFlags(*arguments, batch_size=4, device="cpu"))
    with pytest.raises(InputError, match="not finished"):
        shutil.copytree(data, tmp_path / "d", ignore=shutil.ignore_patterns("text"))
        (tmp_path / "text").rename(tmp_path / "d/text")
        open_captions(tmp_path / "d")
    monkeypatch.setattr(TextEncoder, "__call__", call)
    (tmp_path / "d/text").rename(tmp_path / "text")
    write_captions(CaptionFlags(*arguments, batch_size=4, device="cpu"))
    assert (tmp_path / "text/rows-00000.bin").read_bytes() == (data / "text/rows-00000.bin").read_bytes()


def test_after_a_caption_and_an_image_have_changed_only_the_captions_batch_is_redone(copy, tmp_path, monkeypatch):
    arguments, dest = (copy.parent / "captions.json", copy.parent / "clip"), tmp_path / "text"
    calls, call = [], TextEncoder.__call__

    def counting(self, texts):
        calls.append(texts)
        if len(calls) == 4:  # the empty caption, and two batches
            raise KeyboardInterrupt
        return call(self, texts)

    monkeypatch.setattr(TextEncoder, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        write_captions(CaptionFlags(copy / "images", dest, *arguments, batch_size=4, device="cpu"))
    Image.effect_noise((16, 16), 50).convert("RGB").save(copy / "images/00000/img00000000.png")
    captioned.coco_json(arguments[0], {**captioned.PHOTOS, "astronaut.png": ["a person", "a smile"]})
    write_captions(CaptionFlags(copy / "images", dest, *arguments, batch_size=4, device="cpu"))
    redone = [text for texts in calls[4:] for text in texts]
    assert "a person" in redone and not set(calls[2]).intersection(redone)
    write_captions(CaptionFlags(copy / "images", tmp_path / "fresh", *arguments, batch_size=4, device="cpu"))
    assert tree(dest) == tree(tmp_path / "fresh")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(data, tmp_path):
    arguments = ["--source", data / "images", "--annotations", data.parent / "captions.json", "--device", "cpu"]
    arguments += ["--text-encoder", data.parent / "clip", "--batch-size", "4", "--dest"]
    tool = "preprocessing/dataset_tools.py"
    for folder, start in (("one", programs.run), ("two", functools.partial(programs.run_ranks, 2))):
        done = start(tool, "captions", *arguments, tmp_path / folder)
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_too_long_captions_are_cut_with_one_warning(data, capsys):
    encode = encoder(data)
    long = encode(["x " * 200, "a cat"])
    assert long.shape == (2, 77, captioned.WIDTH)
    encode(["y " * 300])
    assert capsys.readouterr().err.count("cut to 77") == 1
    assert torch.equal(encode(["x " * 400]), encode(["x " * 200]))


def test_captions_of_unequal_length_are_padded_alike(data):
    encode = encoder(data)
    together, alone = encode(["a cat", "a ginger cat looks to the side"]), encode(["a cat"])
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("openai/clip-vit-large-patch14", "clip-vit-large-patch14"),
        ("/cache/models--openai--clip-vit-large-patch14/snapshots/1f", "clip-vit-large-patch14"),
        ("quickstart/text-encoder", "text-encoder"),
    ],
)
def test_families_of_text_encoders(name, family):
    assert encoder_family(name) == family


# ------------------------------------------------------------------------------------------ as U-ViT prepares it


def test_a_folder_as_others_prepare_it(tmp_path, capsys):
    folder = captioned.foreign_folder(tmp_path)
    dataset = open_captions(folder, images=True)
    assert "clip-vit-large-patch14" in capsys.readouterr().err
    assert (len(dataset), dataset.info.captions) == (4, 1 + 2 + 3 + 4)
    moments, context, images = dataset.gather_step(SeekableSampler(4, 4, 0), 0, np.arange(4))
    order = SeekableSampler(4, 4, 0).batch(0)
    for row, index in enumerate(order.tolist()):
        mean, log_variance = np.split(np.load(folder / f"{index}.npy"), 2)
        np.testing.assert_allclose(moments[row], np.concatenate([mean, np.exp(log_variance / 2)]), rtol=1e-6)
        k = int(context[row, 0, 0]) - 10 * index
        assert 0 <= k <= index
        assert images[row].shape == (3, 64, 64)
    assert dataset.conditions(2)[2] == ["caption 0 of 0", "caption 0 of 2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.npy", "1.npy is missing"),
        ("3_0.npy", None),
        ("0_0.npy", "0_0.npy is missing"),
        ("3.npy", "3.npy is missing"),
    ],
)
def test_a_foreign_folder_with_a_missing_file(tmp_path, name, message):
    folder = captioned.foreign_folder(tmp_path)
    (folder / name).unlink()
    if message is None:  # captions need not be numbered without gaps
        assert open_captions(folder).info.captions == 9
        return
    with pytest.raises(InputError, match=message):
        open_captions(folder)


# --------------------------------------------------------------------------------------------------- bad input


def annotations(path, **changes):
    return captioned.coco_json(path, {**captioned.PHOTOS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coffee.png": []}, "no or an empty caption; the first is coffee.png"),
        ({"coffee.png": [" "]}, "an empty caption; the first is coffee.png"),
    ],
)
def test_captions_that_do_not_fit_the_images(data, tmp_path, changes, message):
    path = annotations(tmp_path / "c.json", **changes)
    with pytest.raises(InputError, match=message):
        Captions(data / "images", path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb2312"])
def test_captions_are_read_right_or_refused_in_any_encoding(data, tmp_path, encoding):
    text = json.dumps({name: f"{name}: 狗" for name in captioned.PHOTOS}, ensure_ascii=False, indent=1)
    (tmp_path / "c.json").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    if encoding == "gb2312":
        with pytest.raises(InputError, match=r"c\.json is not JSON .*; give"):
            Captions(data / "images", tmp_path / "c.json")
        return
    assert Captions(data / "images", tmp_path / "c.json").texts[0] == "astronaut.png: 狗"


def test_half_an_emoji_becomes_a_question_mark(data, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(dict.fromkeys(captioned.PHOTOS, "a \ud83d dog")))
    assert Captions(data / "images", tmp_path / "c.json").texts[0] == "a ? dog"


def test_images_in_a_zip_have_the_same_captions(data, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", data / "images")
    packed, plain = (Captions(source, data.parent / "captions.json") for source in (archive, data / "images"))
    assert (packed.texts, packed.names, packed.fingerprint) == (plain.texts, plain.names, plain.fingerprint)


def test_latents_without_labels_are_packed(copy, tmp_path):
    shutil.rmtree(copy / "vae-sd")
    encode(EncodeFlags(copy / "images", copy / "vae-sd", copy.parent / "vae"))
    pack(PackFlags(copy, tmp_path / "packed"))
    shutil.copytree(copy / "text", tmp_path / "packed/text")
    (a, x), (b, y) = ((found, found.gather(range(6))[0]) for found in map(open_captions, (copy, tmp_path / "packed")))
    assert a.info == b.info and torch.equal(x.half(), y)


def test_a_converted_image_that_is_gone_does_not_shift_the_captions(copy):
    (copy / "images/00000/img00000002.png").unlink()
    with pytest.raises(InputError, match=r"--source .*images has 5 images, its manifest says 6"):
        Captions(copy / "images", copy.parent / "captions.json")


@pytest.mark.parametrize("content", ["[1, 2]", '{"annotations": []}', "{}", "not json", '{"a.png": 3}'])
def test_a_file_that_holds_no_captions(data, tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=r"c\.json"):
        Captions(data / "images", tmp_path / "c.json")


def test_a_caption_of_an_image_that_is_not_listed(data, tmp_path):
    stray = {"id": 99, "image_id": 10_000, "caption": "a unicorn"}
    path = captioned.coco_json(tmp_path / "c.json", annotations=[stray])
    with pytest.raises(InputError, match=r"c\.json: 'images' lacks the one of annotation 99"):
        Captions(data / "images", path)


def change_manifest(place, **changes):
    content = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**content, **changes}))


def test_features_of_another_width_or_encoder(copy):
    spec = json.loads((copy / "text/manifest.json").read_text())["text"]
    change_manifest(copy / "text", text={**spec, "width": 64})
    with pytest.raises(InputError, match="rows have shape"):
        open_captions(copy)
    change_manifest(copy / "text", text={})
    with pytest.raises(InputError, match="rows have shape"):
        open_captions(copy)
    a, b = TextSpec(**spec), TextSpec(**{**spec, "encoder": "other", "encoder_sha256": "0" * 64})
    with pytest.raises(InputError, match="text encoder mismatch"):
        a.check_same(b, "data", "--text-encoder")


def test_captions_of_other_images(copy):
    change_manifest(copy / "text", images="another")
    with pytest.raises(InputError, match="other images"):
        open_captions(copy)


def test_a_damaged_set_is_found(copy):
    shutil.rmtree(copy / "text/empty.npy", ignore_errors=True)
    (copy / "text/empty.npy").write_bytes(b"x")
    with pytest.raises(InputError, match="empty"):
        open_captions(copy)
    assert any("checksum" in line for line in verify(copy).lines())
    shutil.rmtree(copy / "text")
    with pytest.raises(InputError, match="captions"):
        open_captions(copy)


def test_a_text_encoder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="--text-encoder"):
        TextEncoder(Path(tmp_path) / "nothing")

"""A scale and shift for every channel: known statistics, from a VAE to images, and what does not fit."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny
import torch
from data_helpers import tree, write_class_folders, write_folder_layout

from common.errors import InputError
from dataset import open_dataset
from models.codec import LatentCodec
from models.export import export
from models.specs import LatentSpec
from preprocessing.channels import ChannelSums, normalizing
from preprocessing.encode import encode
from preprocessing.options import EncodeFlags, MirrorFlags, PackFlags
from preprocessing.pack import pack
from preprocessing.verify import verify


def drawn(offset=0.0, seed=0):
    """(moments (20, 6, 4, 4), mean (3,) and std (3,) of latents drawn from them)."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(20, 3, 4, 4)) * [[[1]], [[5]], [[0.1]]] + offset
    std = rng.uniform(0.5, 2, (20, 3, 4, 4))
    spread = (mean - mean.mean((0, 2, 3), keepdims=True)) ** 2 + std**2
    return np.concatenate([mean, std], axis=1), mean.mean((0, 2, 3)), np.sqrt(spread.mean((0, 2, 3)))


@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_sums_do_not_depend_on_the_batches(size, offset):
    moments, mean, std = drawn(offset)
    parts = [ChannelSums.of(moments[i : i + size]) for i in range(0, len(moments), size)]
    total = functools.reduce(ChannelSums.__add__, parts)
    np.testing.assert_allclose(total.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(total.std(), std, rtol=1e-6)


def test_latents_drawn_with_the_measured_scale_have_mean_0_and_std_1():
    moments = torch.from_numpy(drawn()[0]).repeat(20, 1, 1, 1)
    spec = normalizing(LatentSpec(channels=3), [ChannelSums.of(moments)])
    x = spec.sample(moments, torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3).double(), atol=0.05, rtol=0)


def test_a_constant_channel_is_refused():
    moments = drawn()[0]
    moments[:, 1], moments[:, 4] = 3, 0
    with pytest.raises(InputError, match=r"--normalize: channel 1 .*constant"):
        normalizing(LatentSpec(channels=3), [ChannelSums.of(moments)])


@pytest.fixture(scope="module")
def f16(tmp_path_factory):
    """A VAE of factor 16 with 32 channels."""
    return tiny.vae_folder(tmp_path_factory.mktemp("f16") / "f16d32", scale=1.0, blocks=5, channels=32)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data folder's images: eight of 64×64 pixels in two classes."""
    return write_class_folders(tmp_path_factory.mktemp("64") / "images", classes=2, size=(64, 64))


@pytest.fixture(scope="module")
def data(f16, images, tmp_path_factory):
    """A data folder with normalized latents and a mirrored set."""
    data = tmp_path_factory.mktemp("data")
    (data / "images").symlink_to(images)
    encode(EncodeFlags(images, data / "vae-sd", f16, normalize="per-channel", batch_size=3))
    encode(MirrorFlags(images, data / "vae-sd-mirror", f16))
    return data


def moments_of(folder):
    return open_dataset(folder).gather(range(8))[0].float()


def test_every_way_to_make_the_set_measures_the_same(data, f16, images, tmp_path):
    known = open_dataset(data).info.spec
    sums = ChannelSums.of(moments_of(data))
    np.testing.assert_allclose(known.shift, sums.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(known.scale, 1 / sums.std(), rtol=1e-5)
    encode(EncodeFlags(images, tmp_path / "plain/vae-sd", f16, packed=True, stored_dtype="fp32"))
    assert open_dataset(tmp_path / "plain").info.spec.scale == 1.0
    pack(PackFlags(tmp_path / "plain", tmp_path / "normalized", normalize="per-channel", stored_dtype="fp32"))
    pack(PackFlags(data, tmp_path / "packed"))
    assert open_dataset(tmp_path / "packed", mirror=True).info.spec == known
    found = open_dataset(tmp_path / "normalized").info.spec
    np.testing.assert_allclose([found.scale, found.shift], [known.scale, known.shift], rtol=1e-4, atol=1e-5)
    assert verify(data, vae=f16).faults == {} and verify(tmp_path / "packed", vae=f16).faults == {}


def test_an_interrupted_run_measures_the_same(data, f16, images, tmp_path, monkeypatch):
    calls, whole = [], LatentCodec.encode

    def encode_some(codec, batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise InputError("stopped")
        return whole(codec, batch)

    monkeypatch.setattr(LatentCodec, "encode", encode_some)
    flags = EncodeFlags(images, tmp_path / "vae-sd", f16, normalize="per-channel", batch_size=3)
    with pytest.raises(InputError, match="stopped"):
        encode(flags)
    encode(flags)
    assert tree(tmp_path / "vae-sd") == tree(data / "vae-sd")
    assert calls == [3, 3, 3, 2]  # the first batch is not encoded again, and so its sums come from the journal
    with pytest.raises(InputError, match=r"--dest .*normalize: 'per-channel' there, None now.*another"):
        encode(dataclasses.replace(flags, normalize=None))


def test_moments_prepared_elsewhere_are_measured_when_packed(tmp_path):
    source = write_folder_layout(tmp_path / "source")
    pack(PackFlags(source, tmp_path / "packed", normalize="per-channel"))
    spec = open_dataset(tmp_path / "packed").info.spec
    means = np.arange(12)[:, None] + np.arange(4) / 10  # data_helpers.moments_of, where std is 1
    np.testing.assert_allclose(spec.shift, means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spec.scale, 1 / np.sqrt(means.var(0) + 1), rtol=1e-5)


def test_from_images_to_a_run_to_images(data, f16, images, tmp_path):
    """Training, grids, held-out error, sampling, export and resuming, with latents of 32 channels."""
    encode(EncodeFlags(images, tmp_path / "held/vae-sd", f16, max_images=4))
    options = {"mirror": True, "sampling_steps": 1, "holdout": tmp_path / "held"}
    run = tiny.run_train(data, tmp_path, max_train_steps=1, **options)
    ckpt, spec = run / "checkpoints/0000001.pt", open_dataset(data).info.spec
    _, samples, manifest = tiny.run_generate(ckpt, tmp_path / "samples")
    assert samples.shape == (5, 64, 64, 3)
    assert (tuple(manifest["latents"]["scale"]), tuple(manifest["latents"]["shift"])) == (spec.scale, spec.shift)
    export(ckpt, tmp_path / "exported")
    assert np.array_equal(tiny.run_generate(tmp_path / "exported", tmp_path / "again")[1], samples)
    encode(EncodeFlags(images, tmp_path / "plain/vae-sd", f16))
    with pytest.raises(InputError, match=r"0000001\.pt has scale .*--data-dir has scale 1\.0"):
        tiny.run_train(tmp_path / "plain", tmp_path, resume="auto", **{**options, "mirror": False})


@pytest.mark.parametrize(
    ("blocks", "channels", "options"),
    [(3, 8, {}), (4, 16, {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False})],
)
def test_vaes_of_any_shape_use_their_own_scale(blocks, channels, options, images, tmp_path):
    vae = tiny.vae_folder(tmp_path / "vae", 0.7, blocks, channels, **options)
    encode(EncodeFlags(images, tmp_path / "data/vae-sd", vae))
    spec = open_dataset(tmp_path / "data").info.spec
    expected = (0.7, options.get("shift_factor", 0.0), channels, 2 ** (blocks - 1))
    assert (spec.scale, spec.shift, spec.channels, spec.factor) == expected
    run = tiny.run_train(tmp_path / "data", tmp_path, max_train_steps=1)
    _, samples, _ = tiny.run_generate(run / "checkpoints/0000001.pt", tmp_path / "samples")
    assert samples.shape == (5, 64, 64, 3)

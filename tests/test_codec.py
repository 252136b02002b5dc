"""The latent codec with a tiny autoencoder of random weights, and the checks on what latents were made with."""

import dataclasses
import json
import shutil

import pytest
import torch

from common.errors import InputError
from common.flags import ROOT
from models.codec import LatentCodec, to_uint8
from models.specs import DEFAULT_VAE, LatentSpec, resolve_vae, vae_family

SCALE, SHIFT = 0.5, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a diffusers autoencoder: 3 latent channels, factor 4, scale 0.5, shift 0.25, random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        sample_size=16,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    path = tmp_path_factory.mktemp("vae") / "tiny-vae"
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(folder):
    return LatentCodec.load(folder)


def images(n=5, seed=0):
    return torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def latents(n=5, seed=0):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


# ---- The codec ------------------------------------------------------------------------------------------------------


def test_the_spec_is_read_from_the_folder(codec, folder):
    known = LatentSpec(str(folder), "tiny-vae", SCALE, SHIFT, channels=3, factor=4)
    assert dataclasses.replace(codec.spec, encoder_sha256=None, decoder_sha256=None) == known
    assert not codec.vae.training
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


def test_encode_gives_mean_and_std_of_the_posterior(codec):
    moments = codec.encode(images())
    assert moments.shape == (5, 6, 4, 4) and moments.dtype == torch.float32
    mean, std = moments.chunk(2, dim=1)
    assert (std > 0).all()
    with torch.no_grad():
        posterior = codec.vae.encode(images().float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)


def test_encode_sees_black_as_minus_one_and_white_as_one(codec):
    seen = []
    hook = codec.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    codec.encode(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16))
    hook.remove()
    assert (seen[0][0] == -1).all() and (seen[0][1] == 1).all()


def test_sampling_without_noise_is_the_scaled_mean(codec):
    moments = codec.encode(images())
    sample = codec.spec.sample(moments, torch.zeros(5, 3, 4, 4))
    torch.testing.assert_close(sample, (moments[:, :3] - SHIFT) * SCALE)


def test_sampling_adds_std_times_noise_before_the_scale():
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0)], dim=1)
    noise = torch.full((1, 4, 2, 2), -0.5)
    spec = LatentSpec(scale=0.1, shift=1.0)
    torch.testing.assert_close(spec.sample(moments, noise), torch.full((1, 4, 2, 2), 0.1))  # (3 − 2·0.5 − 1)·0.1


def test_decode_undoes_scale_and_shift(codec):
    seen = []
    hook = codec.vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain = dataclasses.replace(codec.spec, scale=1.0, shift=0.0)
    z = latents()
    decoded = codec.decode((z - SHIFT) * SCALE)
    expected = LatentCodec(codec.vae, plain).decode(z)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1])
    assert decoded.shape == (5, 16, 16, 3) and decoded.dtype == torch.uint8
    assert (decoded.int() - expected.int()).abs().max() <= 1  # a rounding of z can cross a grey level


def test_a_scale_per_channel_is_undone_by_decoding(codec):
    scale, shift = (0.5, 2.0, 0.1), (1.0, 0.0, -3.0)
    each = LatentCodec(codec.vae, dataclasses.replace(codec.spec, scale=scale, shift=shift))
    moments, noise = codec.encode(images()), latents()
    z = moments[:, :3] + moments[:, 3:] * noise
    x = each.spec.sample(moments, noise)
    for c in range(3):
        torch.testing.assert_close(x[:, c], (z[:, c] - shift[c]) * scale[c])
    for given in (x, x.double()):
        torch.testing.assert_close(each.spec.restore(given), z.to(given.dtype), rtol=1e-5, atol=1e-5)
    plain = codec.decode(codec.spec.sample(moments, noise))
    assert (each.decode(x).int() - plain.int()).abs().max() <= 1
    assert (codec.decode(x).int() - plain.int()).abs().max() > 1


def test_a_vae_with_latents_mean_and_std(folder, tmp_path):
    """diffusers' pipelines decode x·std/scaling_factor + mean."""
    shutil.copytree(folder, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    config.update(latents_mean=[1.0, 0.0, -1.0], latents_std=[2.0, 4.0, 1.0])
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    spec, x = LatentCodec.load(tmp_path / "vae").spec, latents()
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(spec.restore(x), x * std / SCALE + mean)


def test_a_scale_per_channel_replaces_only_the_scale_of_the_vae(codec):
    data = dataclasses.replace(codec.spec, scale=(1.0, 2.0, 3.0), shift=(0.0, 0.0, 1.0))
    assert codec.fit(data, "the data").spec == data
    for unlike in ({"encoder_sha256": "1" * 64}, {"channels": 4, "scale": (1.0,) * 4, "shift": 0.0}):
        with pytest.raises(InputError, match=r"the data has .*--vae has"):
            codec.fit(dataclasses.replace(data, **unlike), "the data")
    with pytest.raises(InputError, match=r"the data has scale 0.25 .*--vae has scale 0.5"):
        codec.fit(dataclasses.replace(data, scale=0.25), "the data")


def test_decode_takes_the_samplers_float64(codec):
    assert torch.equal(codec.decode(latents().double()), codec.decode(latents()))


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunking_makes_no_difference(codec, chunk):
    whole, chunked = codec.decode(latents()), codec.decode(latents(), chunk=chunk)
    difference = (whole.int() - chunked.int()).abs()
    assert whole.shape == chunked.shape
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01  # other batch size, other summation order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_in_channels_last_to_nearly_the_same_digits(dtype):
    """The digits' VAE: 0.26 grey levels on average in bf16, 0.03 in fp16 where this was written."""
    z = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    single, half = LatentCodec.load("assets/tiny-vae"), LatentCodec.load("assets/tiny-vae", dtype=dtype)
    for one, other in zip(single.vae.decoder.parameters(), half.vae.decoder.parameters(), strict=True):
        assert one.is_contiguous()
        assert other.dim() < 4 or other.is_contiguous(memory_format=torch.channels_last)
    difference = (single.decode(z).int() - half.decode(z).int()).abs()
    assert 0 < difference.float().mean() < 1 and difference.max() < 16


def test_pixels_are_truncated_after_clamping():
    grey = torch.tensor([-9.0, 0.0, 0.4, 0.99, 1.0, 127.5, 127.99, 254.5, 254.99, 255.0, 255.9, 400.0])
    image = (grey / 127.5 - 1).double().view(1, 1, 1, -1).expand(1, 3, 1, -1)
    expected = [0, 0, 0, 0, 1, 127, 127, 254, 254, 255, 255, 255]
    close = to_uint8(image + 1e-5)  # so that a rounding of grey / 127.5 − 1 does not fall below an integer
    assert close.dtype == torch.uint8 and close.shape == (1, 1, 12, 3)
    assert close[0, 0].tolist() == [[value] * 3 for value in expected]


def test_pixels_keep_rows_columns_and_channels():
    image = torch.full((2, 3, 4, 5), -1.0)
    image[1, 2, 3, 1] = 1.0
    pixels = to_uint8(image)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.nonzero().tolist() == [[1, 3, 1, 2]]
    assert pixels.is_contiguous()


# ---- What latents were made with ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [("family", "other-vae"), ("scale", 0.13025), ("shift", 0.1)])
def test_a_mismatch_names_both_sides_and_the_remedy(field, value):
    trained = LatentSpec()
    other = dataclasses.replace(trained, vae="some/other-vae", **{field: value})
    with pytest.raises(InputError) as caught:
        trained.check_same(other, "--ckpt a.pt", "--data-dir data")
    message = str(caught.value)
    for part in ("--ckpt a.pt", "--data-dir data", field, str(value), str(getattr(trained, field)), "--vae", "encode"):
        assert part in message
    assert "\n" not in message


def test_the_name_alone_is_no_mismatch():
    ema, mse = (LatentSpec(vae=f"stabilityai/sd-vae-ft-{name}") for name in ("ema", "mse"))
    ema.check_same(mse, "a", "b")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("stabilityai/sd-vae-ft-ema", "sd-vae-ft"),
        ("stabilityai/sd-vae-ft-mse", "sd-vae-ft"),
        ("/models/sd-vae-ft-mse", "sd-vae-ft"),
        ("/models/sd-vae-ft-mse/", "sd-vae-ft"),
        ("assets/tiny-vae", "tiny-vae"),
        ("/elsewhere/tiny-vae/", "tiny-vae"),
        ("stabilityai/sd-vae-ft-xyz", "sd-vae-ft-xyz"),
        ("/cache/models--stabilityai--sd-vae-ft-mse/snapshots/31f2", "sd-vae-ft"),
    ],
)
def test_families(name, family):
    assert vae_family(name) == family


def test_short_names():
    assert resolve_vae("ema") == DEFAULT_VAE == "stabilityai/sd-vae-ft-ema"
    assert resolve_vae("mse") == "stabilityai/sd-vae-ft-mse"
    assert LatentSpec() == LatentSpec(DEFAULT_VAE, "sd-vae-ft", 0.18215, 0.0, 4, 8)


def test_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_vae("models") == str(ROOT / "models")
    (tmp_path / "models").mkdir()
    assert resolve_vae("models") == "models"
    assert resolve_vae("some/name") == "some/name"


# ---- What is refused ------------------------------------------------------------------------------------------------


def broken_folders(tmp_path):
    """Folders that hold no autoencoder: empty, broken JSON, weights missing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{not json")
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    return [tmp_path / name for name in ("empty", "broken", "no-weights")]


def test_a_vae_that_is_not_there_is_one_line(tmp_path):
    for name in ["nobody/no-such-vae", str(tmp_path / "none"), *broken_folders(tmp_path)]:
        with pytest.raises(InputError) as caught:
            LatentCodec.load(name)
        message = str(caught.value)
        assert f"'{name}'" in message and "--vae" in message and "\n" not in message


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_truncated_weights_are_one_line(folder, tmp_path, kept):
    copy = tmp_path / "cut-vae"
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = "diffusion_pytorch_model.safetensors"
    (copy / weights).write_bytes((folder / weights).read_bytes()[:kept])
    with pytest.raises(InputError) as caught:
        LatentCodec.load(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)

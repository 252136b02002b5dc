"""VAEs and text encoders are known by their content: the same bytes in any folder, other bytes under no name."""

import dataclasses
import hashlib
import json
import shutil

import captioned
import numpy as np
import pytest
import tiny
import torch
from data_helpers import write_class_folders
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from common.errors import InputError
from dataset import open_dataset
from models.codec import LatentCodec
from models.identity import content_sha256
from models.specs import LatentSpec, recognise_vae
from models.text import TextEncoder, TextSpec
from preprocessing.encode import encode
from preprocessing.options import CaptionFlags, EncodeFlags, PackFlags
from preprocessing.pack import pack
from preprocessing.text import write_captions
from preprocessing.verify import verify

WEIGHTS = "diffusion_pytorch_model.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"
HASHES = ("encoder_sha256", "decoder_sha256")


def copied(folder, place):
    """The folder under another name."""
    return shutil.copytree(folder, place)


def changed_weights(folder, place, prefix, file=WEIGHTS):
    """A copy of the folder with other weights, of the parts whose names begin with `prefix`."""
    place = copied(folder, place)
    state, generator = load_file(place / file), torch.Generator().manual_seed(1)
    state |= {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items() if k.startswith(prefix)}
    save_file(state, place / file, {"format": "pt"})
    return place


def changed_json(path, **changes):
    """The path of a JSON file after its entries have changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def in_hub_cache(folder, cache, name):
    """The snapshot folder of a hub cache that holds a copy of the folder as the repository `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(REVISION)
    return shutil.copytree(folder, repository / "snapshots" / REVISION)


def spec_of(folder):
    return LatentCodec.load(folder).spec


# ------------------------------------------------------------------------------------------------------ the content


def test_the_same_vae_in_other_folders_and_files(vae, tmp_path, monkeypatch):
    known = spec_of(vae)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = in_hub_cache(vae, tmp_path / "cache", "someone/their-vae")
    copied(vae, tmp_path / "pipeline/vae")
    LatentCodec.load(vae).vae.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert [path.name for path in (tmp_path / "half").glob("*.safetensors")] == [WEIGHTS.replace(".s", ".fp16.s")]
    places = [copied(vae, tmp_path / "models"), tmp_path / "pipeline", tmp_path / "half", snapshot, "someone/their-vae"]
    for place in places:
        spec = spec_of(place)
        assert [getattr(spec, name) for name in HASHES] == [getattr(known, name) for name in HASHES], place
        known.check_same(spec, "one", "other")
        assert spec.family != known.family


def test_the_hash_rounds_weights_like_torch():
    """Ties, subnormals, overflow, infinities: as hashes of earlier versions."""
    values = torch.tensor([1.0, 2049.0, 2051.0, 6e-8, 3e-8, 1e-9, 65519.0, 65520.0, -1e30, -torch.inf, -0.0])
    expected = hashlib.sha256(b"{}w (11,)" + values.half().numpy().tobytes()).hexdigest()
    assert content_sha256({"w": values}, "", {}) == content_sha256({"w": values.numpy()}, "w", {}) == expected
    assert content_sha256({"w": values[:, None].expand(11, 2)}, "v", {}) == hashlib.sha256(b"{}").hexdigest()


def test_files_are_recognised_as_the_vae_that_loading_gives(vae, tmp_path):
    known = spec_of(vae)
    moved = copied(vae, tmp_path / "moved")
    for place in (vae, moved, copied(vae, tmp_path / "pipeline/vae").parent):
        assert recognise_vae(place, known) == spec_of(place)
    for prefix in ("encoder", "decoder"):
        assert recognise_vae(changed_weights(vae, tmp_path / prefix, prefix), known) is None
    for change in ({"norm_num_groups": 2}, {"scaling_factor": 0.3}, {"scaling_factor": 0}, {"latents_std": [1.0]}):
        changed_json(moved / "config.json", **{**json.loads((vae / "config.json").read_text()), **change})
        assert recognise_vae(moved, known) is None, change
    changed_json(moved / "config.json", **json.loads((vae / "config.json").read_text())).with_name(WEIGHTS).unlink()
    for place in (moved, "ema", tmp_path / "none"):  # only loading tells what these are
        assert recognise_vae(place, known) is None
    assert recognise_vae(vae, dataclasses.replace(known, encoder_sha256=None)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hash_is_of_the_file_whatever_the_arithmetic(vae, dtype):
    assert LatentCodec.load(vae, dtype=dtype).spec == spec_of(vae)


@pytest.mark.parametrize(
    ("prefix", "differ"),
    [("encoder.conv_in", [True, False]), ("quant_conv", [True, False]), ("decoder", [False, True])],
)
def test_encoder_and_decoder_are_told_apart(vae, tmp_path, prefix, differ):
    """sd-vae-ft-ema and -mse share what makes latents."""
    known, spec = spec_of(vae), spec_of(changed_weights(vae, tmp_path / "tiny-vae", prefix))
    assert [getattr(spec, name) != getattr(known, name) for name in HASHES] == differ
    if differ[0]:
        with pytest.raises(InputError, match=rf"one has encoder_sha256 .*tiny-vae.*--vae {vae}"):
            known.check_same(spec, "one", "other")
    else:
        known.check_same(spec, "one", "other")


@pytest.mark.parametrize("change", [{"norm_num_groups": 2}, {"act_fn": "gelu"}])
def test_settings_that_change_the_outputs_count(vae, tmp_path, change):
    other = copied(vae, tmp_path / "tiny-vae")
    changed_json(other / "config.json", **change)
    assert spec_of(other).encoder_sha256 != spec_of(vae).encoder_sha256


def test_without_a_hash_on_either_side_the_family_decides():
    known = LatentSpec(vae="a/one", family="one", encoder_sha256="1" * 64)
    known.check_same(dataclasses.replace(known, vae="b/two", family="two"), "a", "b")
    known.check_same(dataclasses.replace(known, vae="b/one", encoder_sha256=None), "a", "b")
    dataclasses.replace(known, encoder_sha256=None).check_same(known, "a", "b")
    with pytest.raises(InputError, match=r"a has family one .*b has family two .*use --vae a/one.* rename the folder"):
        known.check_same(dataclasses.replace(known, family="two", encoder_sha256=None), "a", "b")
    with pytest.raises(InputError, match=r"a has encoder_sha256 1+ \(a/one\), b .*use --vae a/one as it was then"):
        known.check_same(dataclasses.replace(known, encoder_sha256="2" * 64), "a", "b")


# ------------------------------------------------------------------------------------------- configurations of VAEs


BAD = [{"scaling_factor": value} for value in (float("nan"), float("inf"), 0, -0.18215, None, "much", [1.0])]
BAD += [{"shift_factor": float("nan")}, {"latents_mean": [0.0] * 4}, {"latents_std": [1.0] * 4}]
BAD += [{"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, {"latents_std": [0.0] * 4, "latents_mean": [0.0] * 4}]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_a_scale_that_cannot_be_used_is_refused_before_anything_is_encoded(vae, tmp_path, change):
    bad = copied(vae, tmp_path / "bad-vae")
    changed_json(bad / "config.json", **change)
    source = write_class_folders(tmp_path / "source", size=(8, 8))
    with pytest.raises(InputError, match=rf"--vae {bad}: config\.json: '{next(iter(change))}.*name a VAE") as caught:
        encode(EncodeFlags(source, tmp_path / "dest", bad, device="cpu"))
    assert "\n" not in str(caught.value) and not (tmp_path / "dest").exists()


def test_weights_that_are_missing_are_not_left_random(vae, tmp_path):
    place = copied(vae, tmp_path / "part")
    state = load_file(place / WEIGHTS)
    save_file({name: t for name, t in state.items() if not name.startswith("encoder.conv_in")}, place / WEIGHTS)
    with pytest.raises(InputError, match=r"'.*part' lacks 2 weights, encoder\.conv_in\.bias"):
        LatentCodec.load(place)


# ------------------------------------------------------------------------------------------- encoding, other commands


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory):
    """A folder with `source` (images), and `vae-sd` and `packed` made of it."""
    root = tmp_path_factory.mktemp("encoded")
    source = write_class_folders(root / "source", size=(16, 16))
    encode(EncodeFlags(source, root / "vae-sd", vae, device="cpu"))
    pack(PackFlags(root / "vae-sd", root / "packed"))
    return root


@pytest.fixture
def copy(encoded, tmp_path):
    return copied(encoded, tmp_path / "copy")


def without_hashes(folder):
    """Make the manifest of a set one of an earlier version; returns it."""
    content = json.loads((folder / "manifest.json").read_text())
    for spec in (content["latents"], content["job"]["latents"]):
        for name in HASHES:
            del spec[name]
    (folder / "manifest.json").write_text(json.dumps(content))
    return content


def test_the_manifest_knows_the_content(encoded, vae):
    for name in ("vae-sd", "packed"):
        assert open_dataset(encoded / name).info.spec == spec_of(vae)


def test_encoding_goes_on_with_the_same_vae_only(encoded, copy, vae, tmp_path, capsys):
    moved = copied(vae, tmp_path / "moved")
    other = changed_weights(vae, tmp_path / "tiny-vae", "encoder")
    encode(EncodeFlags(encoded / "source", copy / "vae-sd", moved, device="cpu"))
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"--dest .*vae-sd has encoder_sha256 .*{vae}.*--vae has .*{other}.*"):
        encode(EncodeFlags(encoded / "source", copy / "vae-sd", other, device="cpu"))


def test_half_filled_sets_go_on_with_the_same_vae_only(encoded, copy, vae, tmp_path):
    (copy / "vae-sd/.partial").mkdir()
    ticket = json.loads((copy / "vae-sd/manifest.json").read_text())["job"]
    (copy / "vae-sd/.partial/job.json").write_text(json.dumps(ticket))
    (copy / "vae-sd/manifest.json").unlink()
    other = changed_weights(vae, tmp_path / "tiny-vae", "encoder")
    with pytest.raises(InputError, match="has encoder_sha256"):
        encode(EncodeFlags(encoded / "source", copy / "vae-sd", other, device="cpu"))
    encode(EncodeFlags(encoded / "source", copy / "vae-sd", copied(vae, tmp_path / "moved"), device="cpu"))
    assert open_dataset(copy / "vae-sd").info.spec.encoder_sha256 == spec_of(vae).encoder_sha256


def test_manifests_without_hash_are_read_by_the_name(encoded, copy, vae, tmp_path, capsys):
    for name in ("vae-sd", "packed"):
        without_hashes(copy / name)
        assert verify(copy / name).faults == {}
        spec = open_dataset(copy / name).info.spec
        assert (spec.family, spec.encoder_sha256) == ("tiny-vae", None)
    encode(EncodeFlags(encoded / "source", copy / "vae-sd", vae, device="cpu"))
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"family tiny-vae .*--vae has family moved.*rename the folder"):
        encode(EncodeFlags(encoded / "source", copy / "vae-sd", copied(vae, tmp_path / "moved"), device="cpu"))


def test_the_vae_of_data_without_manifest_is_known_by_content(copy, vae, tmp_path):
    (copy / "vae-sd/manifest.json").unlink()
    assert open_dataset(copy / "vae-sd", data_vae=vae).info.spec == spec_of(vae)
    with pytest.raises(InputError, match="--data-vae"):
        open_dataset(copy / "packed", data_vae=changed_weights(vae, tmp_path / "tiny-vae", "encoder"))


@pytest.mark.parametrize(("colour", "side", "warns"), [(True, 32, True), (False, 16, True), (False, 32, False)])
def test_images_that_a_vae_never_saw_are_warned_about(tmp_path, capsys, colour, side, warns):
    source = write_class_folders(tmp_path / "source", classes=2, per_class=1, size=(side, side))
    if not colour:
        for path in source.rglob("*.*"):
            tiny.Image.open(path).convert("L").save(path.with_suffix(".png"))
            path.with_suffix(".JPEG").unlink(missing_ok=True)
    encode(EncodeFlags(source, tmp_path / "vae-sd", "assets/tiny-vae", device="cpu"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == warns and all("--vae assets/tiny-vae was trained on" in line for line in said)


# ---------------------------------------------------------------------------------------------- training, sampling


@pytest.fixture
def known(vae, tmp_path):
    """A checkpoint that knows the content of its VAE."""
    path = tiny.checkpoint(tmp_path / "known.pt", vae)
    content = tiny.load(path)
    content["data"] |= dataclasses.asdict(spec_of(vae))
    torch.save(content, path)
    return path


def test_sampling_takes_the_same_vae_from_any_folder(known, reference, vae, tmp_path):
    _, images, manifest = tiny.run_generate(known, tmp_path / "samples", vae=copied(vae, tmp_path / "models"))
    assert np.array_equal(images, reference[1])
    assert manifest["latents"]["encoder_sha256"] == spec_of(vae).encoder_sha256
    other = changed_weights(vae, tmp_path / "wrong/tiny-vae", "encoder")
    with pytest.raises(InputError, match=rf"known\.pt has encoder_sha256 .*--vae has encoder_sha256 .*{other}"):
        tiny.run_generate(known, tmp_path / "other", vae=other)


def test_sampling_goes_on_with_the_same_decoder_only(known, vae, tmp_path, monkeypatch):
    _, images, _ = tiny.run_generate(known, tmp_path / "samples")
    rows = tiny.count_calls(monkeypatch)
    with monkeypatch.context() as patch:  # finished images need no VAE
        patch.setattr(LatentCodec, "load", lambda *_: pytest.fail("it is loaded"))
        _, again, _ = tiny.run_generate(known, tmp_path / "samples", vae=copied(vae, tmp_path / "moved/tiny-vae"))
    assert rows == [] and np.array_equal(again, images)
    other = changed_weights(vae, tmp_path / "other/tiny-vae", "decoder")
    tiny.run_generate_only(known, tmp_path / "samples", vae=other)  # in a folder of its own
    (npz,) = (tmp_path / "samples").glob(f"*-vae-{spec_of(other).decoder_sha256[:8]}-*.npz")
    assert not np.array_equal(np.load(npz)["arr_0"], images)
    record = npz.with_suffix("") / "settings.json"
    record.write_text(record.read_text().replace(spec_of(other).decoder_sha256, "0" * 64))
    with pytest.raises(InputError, match=r"holds images made with other settings: latents was .*--sample-dir"):
        tiny.run_generate_only(known, tmp_path / "samples", vae=other)


@pytest.mark.parametrize("form", ["both", "npz"])
def test_samples_of_earlier_versions_are_finished_still(known, tmp_path, monkeypatch, form):
    _, images, _ = tiny.run_generate(known, tmp_path, format=form)
    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("*/settings.json")):
        latents = json.loads(path.read_text())["latents"]
        changed_json(path, latents={name: value for name, value in latents.items() if name not in HASHES})
    rows = tiny.count_calls(monkeypatch)
    assert np.array_equal(tiny.run_generate(known, tmp_path, format=form)[1], images) and rows == []


SAME = {"vae": "moved/vae", "family": "vae"}


def test_training_goes_on_with_latents_of_the_same_vae_only(tmp_path):
    spec = dataclasses.replace(tiny.SPEC, encoder_sha256="1" * 64)
    tiny.run_train(tiny.data_folder(tmp_path / "data", spec=spec), tmp_path / "exps", max_train_steps=1)
    for name, changes in (("other", {"encoder_sha256": "2" * 64}), ("channels", {"scale": 0.25})):
        data = tiny.data_folder(tmp_path / name, spec=dataclasses.replace(spec, **changes))
        with pytest.raises(InputError, match=rf"0000001\.pt has {next(iter(changes))} .*--data-dir has"):
            tiny.run_train(data, tmp_path / "exps", resume="auto", max_train_steps=2)
    data = tiny.data_folder(tmp_path / "same", spec=dataclasses.replace(spec, **SAME))
    tiny.run_train(data, tmp_path / "exps", resume="auto", max_train_steps=2)
    data = tiny.data_folder(tmp_path / "old", spec=dataclasses.replace(spec, encoder_sha256=None))
    with pytest.raises(InputError, match=r"0000002\.pt has family vae .*--data-dir has family tiny-vae"):
        tiny.run_train(data, tmp_path / "exps", resume="auto", max_train_steps=3)


def test_the_grids_of_training_are_decoded_by_the_same_vae_only(vae, tmp_path):
    data = tiny.data_folder(tmp_path / "data", spec=spec_of(vae))
    tiny.run_train(data, tmp_path / "a", max_train_steps=1, sampling_steps=1, vae=copied(vae, tmp_path / "models"))
    other = changed_weights(vae, tmp_path / "tiny-vae", "encoder")
    with pytest.raises(InputError, match=r"the data has encoder_sha256 .*--vae has"):
        tiny.run_train(data, tmp_path / "b", max_train_steps=1, sampling_steps=1, vae=other)


# ---------------------------------------------------------------------------------------------------- text encoders


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return captioned.text_folder(tmp_path_factory.mktemp("text") / "clip")


def text_sha256(folder):
    return TextEncoder(folder).spec.encoder_sha256


def test_the_same_text_encoder_in_other_folders_and_files(clip, tmp_path, monkeypatch):
    known = text_sha256(clip)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = in_hub_cache(clip, tmp_path / "cache", "someone/clip")
    encoder = TextEncoder(clip)
    encoder.model.half().save_pretrained(tmp_path / "pipeline/text_encoder", variant="fp16")
    encoder.tokens.tokenizer.save_pretrained(tmp_path / "pipeline/tokenizer")
    for place in (copied(clip, tmp_path / "models"), tmp_path / "pipeline", snapshot, "someone/clip"):
        assert text_sha256(place) == known, place


def test_other_weights_settings_and_tokenizers_count(clip, tmp_path):
    weights = changed_weights(clip, tmp_path / "weights/clip", "", "model.safetensors")
    settings, tokenizer = copied(clip, tmp_path / "settings/clip"), copied(clip, tmp_path / "tokenizer/clip")
    changed_json(settings / "config.json", hidden_act="gelu")
    path = next(tokenizer.glob("tokenizer.json"))
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    assert len({text_sha256(place) for place in (clip, weights, settings, tokenizer)}) == 4


def test_a_folder_without_tokenizer_is_refused(clip, tmp_path):
    TextEncoder(clip).model.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(InputError, match=r"text_encoder' .its tokenizer has .* pass --text-encoder"):
        TextEncoder(tmp_path / "text_encoder")


def test_captions_and_prompts_take_the_same_text_encoder_only(clip, tmp_path, capsys):
    root = tmp_path / "root"
    captioned.photos(root / "photos")
    arguments = [root / "photos", root / "text", captioned.coco_json(root / "captions.json")]
    write_captions(CaptionFlags(*arguments, clip, device="cpu"))
    moved = copied(clip, tmp_path / "moved")
    write_captions(CaptionFlags(*arguments, moved, device="cpu"))
    assert "nothing to do" in capsys.readouterr().err
    other = captioned.text_folder(tmp_path / "other/clip", seed=1)
    with pytest.raises(InputError, match=rf"--dest .*text has encoder_sha256 .*--text-encoder has .*{other}"):
        write_captions(CaptionFlags(*arguments, other, device="cpu"))

    path = captioned.checkpoint(root / "t2i.pt", root)
    content = tiny.load(path)
    content["data"]["text"] = dataclasses.asdict(TextEncoder(clip).spec)
    torch.save(content, path)
    captioned.run_generate(path, tmp_path / "samples", "a cat", text_encoder=moved)
    with pytest.raises(InputError, match=rf"t2i\.pt has encoder_sha256 .*--text-encoder has .*{other}"):
        captioned.run_generate(path, tmp_path / "samples", "a cat", text_encoder=other)


def test_text_features_without_hash_are_known_by_the_name():
    known = TextSpec(encoder_sha256="1" * 64)
    known.check_same(TextSpec("/models/clip-vit-large-patch14"), "a", "b")
    with pytest.raises(InputError, match="text encoder mismatch"):
        known.check_same(TextSpec("other", "other"), "a", "b")

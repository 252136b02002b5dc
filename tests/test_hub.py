"""Files from the hub: its cache, and without a network an error within seconds that says what to pass instead."""

import threading
import types

import numpy as np
import pytest
import tiny
from huggingface_hub import constants

from common.errors import InputError
from evaluations import sweep
from evaluations.metrics.features import load_dinov2, load_features
from evaluations.metrics.inception import Inception
from models import hub, load_model
from models.checkpoints import find_checkpoint
from models.codec import LatentCodec
from models.deepflow import DeepFlow
from models.encoders import Encoder
from models.export import export
from models.text import TextEncoder

COMMITS = "1" * 40, "2" * 40


class Site:
    """A hub client: `answer` is a status code, an exception, or None for a server that never answers."""

    def __init__(self, answer):
        self.answer, self.asked, self.end = answer, [], threading.Event()

    def head(self, url, timeout):
        self.asked.append(url)
        if self.answer is None:
            self.end.wait(20)
        if isinstance(self.answer, Exception):
            raise self.answer
        return types.SimpleNamespace(status_code=self.answer)


@pytest.fixture
def site(monkeypatch, tmp_path, request):
    """The Site that this process asks, with empty caches and without HF_HUB_OFFLINE."""
    site = Site(request.param)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: site)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    hub.answers.cache_clear()
    yield site
    site.end.set()
    hub.answers.cache_clear()


LOOK_UPS = {
    "vae": (lambda: LatentCodec.load("ema"), "--vae"),
    "text": (TextEncoder, "--text-encoder"),
    "alignment": (lambda: Encoder("dinov2-vit-s", 32), "--enc-ckpt FILE"),
    "features": (lambda: load_features("resnet10t"), "TorchScript file"),
    "dinov2": (lambda: load_dinov2(name="vit_small_patch14_dinov2.lvd142m"), "--dinov2-weights"),
    "inception": (Inception, "--inception-weights"),
    "model": (lambda: DeepFlow.from_pretrained("someone/deepflow"), "folder"),
}


@pytest.mark.parametrize("site", [OSError("name resolution"), None], indirect=True, ids=["no name", "no answer"])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_a_look_up_without_network_names_what_can_be_given(site, name, monkeypatch):
    look_up, named = LOOK_UPS[name]
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a client that asks again"))
    with pytest.raises(InputError, match="no answer from https://") as caught:
        look_up()
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert len(site.asked) == 1
    assert name == "inception" or constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("site", [200, 404, 503], indirect=True)
def test_a_site_that_works_is_left_to_the_library(site):
    with hub.fetching("it", "someone/it", "give it"):
        assert constants.HF_HUB_OFFLINE == (site.answer == 503)
    assert site.asked == [constants.ENDPOINT]


@pytest.mark.parametrize("site", [None], indirect=True)
def test_what_is_at_hand_is_not_asked_for(site, tmp_path, vae):
    LatentCodec.load(vae)
    with hub.fetching("it", tmp_path, "give it", "https://host/file"):
        pass
    assert site.asked == [] and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("site", [200], indirect=True)
@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("two\nlines"), r"cannot load it \(two\); give it"),
        (OSError(28, "No space left on device", "x.bin"), "x.bin: No space left"),
        (InputError("--flag: own words"), "^--flag: own words$"),
    ],
    ids=str,
)
def test_what_a_library_raises_ends_in_one_line(site, error, named):
    with pytest.raises(InputError, match=named), hub.fetching("it", "someone/it", "give it"):
        raise error


def test_offline_mode_asks_nobody():
    assert not hub.answers(constants.ENDPOINT)


@pytest.fixture
def hub_cache(ckpt, tmp_path, monkeypatch):
    """A hub's cache, offline, with two commits of the repository someone/tiny: raw weights, then (`main`) EMA."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache/models--someone--tiny"
    for commit, weights in zip(COMMITS, ("raw", "ema"), strict=True):
        export(ckpt, repo / "snapshots" / commit, weights)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMITS[1])
    (repo / "refs/first").write_text(COMMITS[0])
    return repo


def test_a_repository_is_sampled_and_the_manifest_names_its_commit(hub_cache, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, images, manifest = tiny.run_generate("someone/tiny", "samples")
    assert np.array_equal(images, reference[1])
    assert manifest["ckpt"] == f"someone/tiny@{COMMITS[1]}"
    assert manifest["weights_sha256"] == reference[2]["weights_sha256"]
    again = tiny.run_generate(manifest["ckpt"], "again")[2]
    assert again == manifest


@pytest.mark.parametrize(("revision", "commit"), [("first", 0), ("main", 1), (COMMITS[0], 0)])
def test_a_revision_is_pinned(hub_cache, ckpt, revision, commit, capsys):
    assert find_checkpoint(f"someone/tiny@{revision}") == f"someone/tiny@{COMMITS[commit]}"
    assert (COMMITS[commit] in capsys.readouterr().err) == (revision != COMMITS[commit])
    weights = ("raw", "ema")[commit]
    model, _ = load_model(f"someone/tiny@{revision}", weights)
    assert not tiny.differences(model.state_dict(), load_model(ckpt, weights)[0].state_dict())


def test_local_paths_take_precedence(hub_cache, ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(ckpt, "someone/tiny", "raw")
    assert find_checkpoint("someone/tiny") == "someone/tiny"
    load_model("someone/tiny", "raw")
    assert find_checkpoint("someone/tiny@main").endswith(COMMITS[1])


@pytest.mark.parametrize(
    "name", ["exps/0001000.pt", "a.safetensors", "/exps/run", "../run", "a/b/c", "run", "exps/run/"]
)
def test_paths_are_not_looked_up(name):
    assert not hub.is_on_hub(name)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("someone/other", "not a local file"),
        ("someone/tiny@second", "not a local file"),
        ("someone/ti--ny", "not a local file"),
        (f"someone/tiny@{COMMITS[0]}", "has no model.safetensors"),
    ],
)
def test_a_repository_that_cannot_be_read_gives_one_line(hub_cache, name, named, tmp_path):
    (hub_cache / "snapshots" / COMMITS[0] / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"--ckpt {name}.*{named}") as caught:
        tiny.run_generate(name, tmp_path / "samples")
    assert "\n" not in str(caught.value) and not (tmp_path / "samples").exists()


def test_a_sweep_pins_a_repository(hub_cache, tmp_path):
    flags = ["--ref", "digits", "--out", str(tmp_path / "out"), "--exit-branch", "1"]
    sweeps = sweep.per_checkpoint(sweep.parse(["--ckpt", "someone/tiny", *flags])[0])
    sweep.check(sweeps, [])
    assert COMMITS[1] in (tmp_path / "out/sweep.json").read_text()


def test_training_from_a_repository_names_its_own_flag(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    with pytest.raises(InputError, match="--init-from someone/flow"):
        tiny.run_train_dmf(data, tmp_path / "exps", "someone/flow")

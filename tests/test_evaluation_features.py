"""Feature extractors other than InceptionV3: preprocessing, DINOv2's position embedding, loading and its errors."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from evaluation_helpers import script

from common.errors import InputError
from evaluations.metrics.features import ImageNetwork, load_dinov2, load_features, resample_position

SMALL = "vit_small_patch14_dinov2.lvd142m"  # stands for ViT-L/14, which takes a gigabyte


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """(file in the authors' layout, its state dict), random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = timm.create_model(SMALL, num_classes=0).state_dict()
        state["pos_embed"] = torch.randn(state["pos_embed"].shape)
    path = tmp_path_factory.mktemp("dinov2") / "weights.pth"
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, path)
    return path, state


def test_dinov2_is_the_class_token_after_the_norm_of_the_resized_image(dinov2):
    path, state = dinov2
    extractor = load_dinov2(path, name=SMALL)
    images = torch.randint(0, 256, (2, 3, 70, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = extractor(images)["pool"]
    assert rows.shape == (2, 384) and extractor.name == "dinov2_vitl14"
    x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)  # neither rounded nor clamped
    assert x.min() < 0 and x.max() > 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (x / 255 - mean) / std
    network = extractor.network
    with torch.no_grad():
        tokens = network.norm_pre(network._pos_embed(network.patch_embed(x)))
        for block in network.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(rows, network.norm(tokens)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"], rtol=0, atol=0)
    torch.testing.assert_close(network.pos_embed[:, :1], state["pos_embed"][:, :1], rtol=0, atol=0)


def cubic(samples, place, a=-0.75):
    """Cubic convolution (Keys 1981) of a 1-D signal at `place`, with PyTorch's a; ends are repeated."""
    total = 0.0
    for i in range(math.floor(place) - 1, math.floor(place) + 3):
        d = abs(place - i)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        total += (near if d <= 1 else far) * samples[min(max(i, 0), len(samples) - 1)]
    return total


def test_position_embedding_is_sampled_at_the_authors_places():
    """Output i lies at (i + ½)·37/16.1 − ½, by cubic interpolation without antialiasing."""
    side, grid = 37, 16
    line = torch.randn(side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_patches = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).view(1, side * side, 2)
    embedding = torch.cat([torch.tensor([[[7.0, 8.0]]], dtype=torch.float64), of_patches], dim=1)
    found = resample_position(embedding, grid)
    assert found.shape == (1, 1 + grid * grid, 2) and found[0, 0].tolist() == [7, 8]
    expected = [cubic(line.tolist(), (i + 0.5) * side / 16.1 - 0.5) for i in range(grid)]
    rows, columns = found[0, 1:].view(grid, grid, 2).unbind(-1)
    assert rows[:, 5].tolist() == pytest.approx(expected, rel=1e-9)
    assert columns[5].tolist() == pytest.approx(expected, rel=1e-9)


def test_any_timm_model_is_taken_with_its_own_preprocessing(monkeypatch):
    model = timm.create_model("resnet10t", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: model)
    extractor = load_features("resnet10t")
    assert isinstance(extractor, ImageNetwork) and extractor.name == "resnet10t"
    assert (extractor.size, extractor.mode) == ((176, 176), "bicubic")
    assert extractor(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))["pool"].shape == (2, 512)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no_such_model", "cannot load --features no_such_model .*timm.list_models"),
        ("local-dir:/nowhere", "cannot load --features local-dir:/nowhere .*TorchScript file"),
        ("/nowhere/script.pt", "--features /nowhere/script.pt.* TorchScript file"),
    ],
)
def test_unknown_extractors_end_in_one_line(name, match):
    with pytest.raises(InputError, match=match) as caught:
        load_features(name)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_one_altered_bit_is_noticed(dinov2, tmp_path):
    altered, of_script = tmp_path / "altered.pt", script(tmp_path / "script.pt", torch.nn.Linear(1000, 8))
    for path, load in ((dinov2[0], lambda file: load_dinov2(file, name=SMALL)), (of_script, load_features)):
        data = bytearray(Path(path).read_bytes())
        data[len(data) // 2] ^= 1
        altered.write_bytes(data)
        with pytest.raises(InputError, match=r"altered\.pt.*checksum"):
            load(str(altered))


def test_dinov2_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    for path in (tmp_path / "text.pth", tmp_path / "none.pth"):
        with pytest.raises(InputError, match=f"DINOv2 {path} .*--dinov2-weights"):
            load_dinov2(path, name=SMALL)

"""Probing a network's blocks: CKNNA and linear maps against known answers, and what the network is shown."""

import dataclasses
import json
import shutil

import captioned
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from common.errors import InputError
from common.flags import parse_flags
from evaluations import probe, table
from evaluations.metrics.alignment import cknna
from evaluations.metrics.results import Result
from latents.manifest import FORMAT, LABELS_JSON, MANIFEST, NAMES, VERSION
from samplers import sample_noise

COUNT = 60


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(size):
    return torch.linalg.qr(normal(size, size, seed=9)).Q


# ------------------------------------------------------------------------------------------------------ CKNNA


def test_cknna_of_four_points_by_hand():
    """x: two pairs, centred cosines 1 − 1/2. y: 0 and 1 are a pair, 2 is nearest to them, 3 to 2.

    Shared: 0→1, 1→0 and 3→2. Centred cosines of y: 1 − 0.4, 1 − 0.4, 0.6 − 0.4, −0.6 + 0.4.
    """
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    shared, of_x, of_y = 0.5 * (0.6 + 0.6 - 0.2), 4 * 0.5**2, 2 * 0.6**2 + 2 * 0.2**2
    assert cknna(x, y, k=1) == cknna(y, x, k=1) == pytest.approx(shared / (of_x * of_y) ** 0.5)


def test_cknna_by_its_definition():
    """Sums over all pairs, with masks, as in the papers."""
    x, y, k = normal(20, 5), normal(20, 3, seed=1) + normal(20, 3)[:, :1], 4
    kernels = [unit @ unit.T for unit in (rows / rows.norm(dim=1, keepdim=True) for rows in (x, y))]
    masks = [torch.zeros(20, 20) for _ in kernels]
    for kernel, mask in zip(kernels, masks, strict=True):
        for i in range(20):
            nearest = sorted((j for j in range(20) if j != i), key=lambda j: -kernel[i, j])
            mask[i, nearest[:k]] = 1

    def align(a, b):
        centred = [kernels[n] - kernels[n].mean(dim=1, keepdim=True) for n in (a, b)]
        return (masks[a] * masks[b] * centred[0] * centred[1]).sum().item()

    expected = align(0, 1) / (align(0, 0) * align(1, 1)) ** 0.5
    assert 0 < expected < 1 and cknna(x, y, k) == pytest.approx(expected, rel=1e-5)


def test_cknna_is_1_for_rotated_and_scaled_features():
    x = normal(80, 6)
    assert cknna(x, x) == pytest.approx(1)
    assert cknna(x, 7 * x @ rotation(6)) == pytest.approx(1, abs=1e-5)
    y = normal(80, 4, seed=1) + x[:, :4]
    assert cknna(x @ rotation(6), 0.1 * y) == pytest.approx(cknna(x, y), abs=1e-5)


def test_cknna_is_near_0_for_independent_and_for_constant_features():
    x, y = normal(500, 16), normal(500, 16, seed=1)
    assert abs(cknna(x, y)) < 0.1 < cknna(x, x + y)
    assert cknna(x, torch.ones(500, 3)) == pytest.approx(0, abs=0.1)
    assert cknna(x, torch.zeros(500, 3)) == 0


# ------------------------------------------------------------------------------------------------------ linear maps


def test_linear_maps_of_toy_features():
    """Classes that a plane separates, and an encoder that is a linear map of the features, are found; noise is not."""
    x, labels = normal(400, 8), np.arange(400) % 2
    x[:, 3] += 8 * torch.from_numpy(labels)
    features = {"linear": x @ normal(8, 5, seed=1) + 100, "noise": normal(400, 5, seed=2)}

    def part(rows, labels):
        return x[rows], (labels[rows], {name: found[rows] for name, found in features.items()})

    (fit, of_fit), (held, of_held) = (part(rows, labels) for rows in (slice(200), slice(200, 400)))
    found = probe.compare(fit, held, of_fit, of_held)
    assert found["accuracy"] > 0.98 and found["cosine linear"] > 0.99 and abs(found["cosine noise"]) < 0.3
    assert found["CKNNA linear"] == pytest.approx(cknna(held, of_held[1]["linear"]))
    shuffled = np.random.default_rng(0).permutation(labels)
    (fit, of_fit), (held, of_held) = (part(rows, shuffled) for rows in (slice(200), slice(200, 400)))
    assert 0.3 < probe.compare(fit, held, of_fit, of_held)["accuracy"] < 0.7


def test_colours_are_the_principal_components():
    """2 × 2 tokens of two images along three directions, by how much they vary: red, green, blue."""
    axes = torch.tensor([[9.0, -3, -3, -3, 0, 0, 0, 0], [0, 0, 0, 0, 5, -5, 0, 0], [0, 0, 0, 0, 0, 0, -2, 2]])
    tokens = (rotation(6)[:3].T @ axes).T.view(2, 4, 6)
    found = probe.colours(tokens + 50)
    assert found.shape == (2, 2, 2, 3) and found.dtype == np.uint8
    flat = found.reshape(8, 3).astype(int)
    assert flat[:, 0].argmax() == 0 and {*flat[:, 1].argsort()[[0, -1]]} == {4, 5}
    assert {*flat[:, 2].argsort()[[0, -1]]} == {6, 7} and (flat.max(0) == 255).all() and (flat.min(0) == 0).all()
    assert probe.colours(torch.ones(1, 1, 2)).shape == (1, 1, 1, 3)


# ------------------------------------------------------------------------------------------------------ the program


def write_features(data, name, rows):
    """A set of features (N, T, Z) of the images of a tiny data folder."""
    folder = data / f"features-{name}"
    folder.mkdir()
    for number, row in enumerate(rows):
        np.save(folder / f"{number:08d}.npy", row)
    shutil.copy(data / "vae-sd" / NAMES, folder)
    (folder / LABELS_JSON).write_text('{"labels": null}')
    content = {"format": FORMAT, "version": VERSION, "kind": "features", "count": len(rows), "flipped": False}
    (folder / MANIFEST).write_text(json.dumps({**content, "encoder": {"name": name, "weights": "none"}}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Latents whose mean tells their class, two encoders' features, and checkpoints of each kind."""
    folder, rng = tmp_path_factory.mktemp("probe"), np.random.default_rng(0)
    offsets = rng.standard_normal((tiny.CLASSES, 4, 1, 1))
    mean = 3 * offsets[np.arange(COUNT) % tiny.CLASSES] + rng.standard_normal((COUNT, 4, tiny.SIZE, tiny.SIZE)) / 10
    data = tiny.data_folder(folder / "data", COUNT, mean=mean)
    write_features(data, "means", mean.reshape(COUNT, 4, -1).swapaxes(1, 2).astype(np.float32))
    write_features(data, "noise", rng.standard_normal((COUNT, 2, 5), dtype=np.float32))
    for name in ("DeepFlow", "SiT", "DMFT", "DeepFlow-DMF"):
        tiny.checkpoint(folder / f"{name}.pt", "tiny-vae", f"{name}-Ti/2")
    return folder


def words(place, out, name="DeepFlow", **more):
    values = {"ckpt": place / f"{name}.pt", "data_dir": place / "data", "out": out, "holdout": 0.4, "times": 0.25}
    return tiny.flags(**{**values, **more})


def test_the_program(place, tmp_path, capsys):
    probe.main(words(place, tmp_path, times=[0.0, 1.0], blocks=[3, 1, 3], pictures=2))
    result = Result.read(tmp_path / "probe.json")
    measures = ("accuracy", "CKNNA means", "cosine means", "CKNNA noise", "cosine noise")
    names = {f"{measure}, t {t}, block {block}" for measure in measures for t in (0, 1) for block in (1, 3)}
    assert result.metrics.keys() == names
    assert result.metrics["accuracy, t 0, block 1"] == 1 > result.metrics["accuracy, t 1, block 1"]
    assert result.metrics["cosine means, t 0, block 3"] > 0.9 > 0.6 > result.metrics["cosine noise, t 0, block 3"]
    assert result.curves["accuracy, t 0"] == [[1, 1.0], [3, result.metrics["accuracy, t 0, block 3"]]]
    assert (result.settings["model"], result.settings["step"]) == ("DeepFlow-Ti/2", 3)
    out = capsys.readouterr().out
    assert out.startswith((tmp_path / "table.md").read_text()) and "null class" in out
    pictures = {path.name for path in tmp_path.glob("*.png")}
    plots = {f"{measure.replace(' ', '-')}.png" for measure in measures}
    assert pictures == {"tokens-t0.png", "tokens-t1.png", *plots}
    assert Image.open(tmp_path / "tokens-t1.png").width > 3 * 64  # x_t, blocks 1 and 3
    table.main([str(tmp_path / "probe.json")])
    assert "CKNNA means, t 1, block 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["DeepFlow", "SiT", "DMFT", "DeepFlow-DMF"])
def test_the_network_sees_noised_means_and_the_null_class(place, tmp_path, name):
    args = parse_flags(probe.ProbeFlags, words(place, tmp_path, name))
    network, (_, held) = probe.Probe(args), probe.open_parts(args)
    network.check_data(held.info)
    model, rows = network.model, held.rows.tolist()
    mean = torch.from_numpy(np.stack([np.load(tiny.moments_file(place / "data", row))[:4] for row in rows]))
    x = 0.7 * tiny.SPEC.scale * mean + 0.3 * sample_noise(args.seed, rows, 1, mean.shape[1:])
    with torch.no_grad():
        *_, final = branches = list(
            model.run_branches(x, torch.full((len(x),), 0.3), torch.full((len(x),), tiny.CLASSES))
        )
    found = network.pooled(held, 0.3, 1)
    for block, branch in zip(model.ends, branches, strict=True):
        torch.testing.assert_close(found[block], branch.v_star.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert len(found) == 4 and final.v_star.shape[1] == 16


def test_results_do_not_depend_on_batch_size(place, tmp_path):
    found = []
    for size in (7, 64):
        args = parse_flags(probe.ProbeFlags, words(place, tmp_path, per_proc_batch_size=size))
        fit, _ = probe.open_parts(args)
        found.append((probe.Probe(args).pooled(fit, 0.5, 0), probe.targets(fit, size)))
    (one, known), (all_, also) = found
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(known[1], also[1])
    np.testing.assert_array_equal(known[0], also[0])


def test_parts_are_disjoint_and_of_the_size_asked_for(place, tmp_path):
    fit, held = probe.open_parts(parse_flags(probe.ProbeFlags, words(place, tmp_path)))
    assert {*fit.rows} | {*held.rows} == {*range(COUNT)} and len(fit) + len(held) == COUNT
    other = tiny.data_folder(tmp_path / "other", 15)
    args = parse_flags(probe.ProbeFlags, [*words(place, tmp_path, holdout=other, max_images=9), "--features"])
    fit, held = probe.open_parts(args)
    assert (len(fit), len(held), fit.features) == (9, 9, {}) and held.rows.tolist()[-1] == 13


def test_mistakes_are_named(place, tmp_path):
    small = tiny.data_folder(tmp_path / "small", 30, shape=(8, 4, 4))
    alike = tiny.data_folder(tmp_path / "alike", 30, labels=[1] * 30)
    other = tiny.data_folder(tmp_path / "encoded", 30, dataclasses.replace(tiny.SPEC, family="other"))
    odd = tiny.data_folder(tmp_path / "odd", 40)
    write_features(odd, "odd", np.full((40, 1, 3), np.nan, np.float32))
    nan = tiny.load(place / "SiT.pt")
    nan["ema"]["blocks.1.mlp.fc1.bias"][:] = torch.nan
    torch.save(nan, tmp_path / "nan.pt")
    text = captioned.checkpoint(tmp_path / "text.pt", tmp_path / "coco")
    for match, changes in {
        r"--blocks 5 is out of range; .*1 to 4": {"blocks": [1, 5]},
        r"--times 1.5 is out of range": {"times": 1.5},
        r"--features dino: .*no folder features-dino; .*dataset_tools features": {"features": "dino"},
        r"--holdout 0.001 .*raise it": {"holdout": 0.001},
        r"--holdout 0.4: CKNNA .*, not 10; hold out more, or pass --features": {"max_images": 10},
        r"--holdout .*lacks features-": {"holdout": other},
        r"--data-dir .*small has moments \(8, 4, 4\)": {"data_dir": small},
        r"--data-dir .*of one class": {"data_dir": alike},
        r"--features odd: .*not finite": {"data_dir": odd},
        r"VAE mismatch: .*--data-dir": {"data_dir": other},
        r"nan.pt gives tokens that are not finite \(block 2\)": {"ckpt": tmp_path / "nan.pt"},
        r"--ckpt .*text.pt is a text-to-image model; name": {"ckpt": text},
        r"--out: .*": {"out": place / "SiT.pt"},
    }.items():
        with pytest.raises(InputError, match=match):
            probe.main(words(place, **{"out": tmp_path / "out", **changes}))
        assert not (tmp_path / "out" / "probe.json").exists()

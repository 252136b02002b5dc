"""Every number of evaluation.json: distances, scores, precision and recall, resize, InceptionV3, EDM2's rules."""

import ast
import hashlib

import numpy as np
import pytest
import torch
from parity import evaluation_inputs, family
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1_resize

from evaluations.calculate_metrics import choose_subset, split_batches
from evaluations.metrics.frechet import frechet_distance, statistics
from evaluations.metrics.inception import Inception, inception_score, load_network
from evaluations.metrics.precision_recall import HALF_MAX, PRECISIONS, memberships, radii

DATA, ARRAYS = family("evaluation")
CASES = DATA["cases"] or {}
SYNTHETIC = DATA.get("inception_synthetic", {"expected": {}})
EDM2 = DATA.get("edm2", {"subset_of_25": {}, "batch_sizes": {}})
BOTH = pytest.mark.parametrize("sqrtm", [False, True], ids=["singular", "sqrtm"])
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def features(case):
    """(reference, sample) tensors of a case; skips where the local random stream is another one."""
    make = evaluation_inputs()
    reference, sample = make.CASES[case["function"]]()
    if (make.sha256(reference), make.sha256(sample)) != (case["ref_sha256"], case["sample_sha256"]):
        pytest.skip("the random stream of this numpy differs")
    assert (list(reference.shape), list(sample.shape)) == (case["ref_shape"], case["sample_shape"])
    return torch.from_numpy(reference), torch.from_numpy(sample)


def moments(case):
    """The sample's statistics, then the reference's: the order of the published arguments."""
    reference, sample = features(case)
    return statistics(sample) + statistics(reference)


def test_the_cases_are_there():
    assert CASES or DATA == {"cases": [], "manifests": {}, "recipe": {}}  # only a folder of the user's may lack them


@ALL_CASES
def test_parity_moments(case):
    mu_s, sigma_s, mu_r, sigma_r = moments(case)
    expected = case["moments_float64"]
    for key, mu, sigma in (("ref", mu_r, sigma_r), ("sample", mu_s, sigma_s)):
        scale = np.abs(mu).sum()  # the sum of the means cancels
        assert mu.sum() == pytest.approx(expected[f"{key}_mu_sum"], rel=1e-10, abs=1e-10 * scale)
        assert np.trace(sigma) == pytest.approx(expected[f"{key}_sigma_trace"], rel=1e-10)
        assert np.linalg.norm(sigma) == pytest.approx(expected[f"{key}_sigma_fro"], rel=1e-10)


@BOTH
@ALL_CASES
def test_parity_frechet(case, sqrtm):
    mu_s, sigma_s, mu_r, sigma_r = moments(case)
    value = frechet_distance(mu_s, sigma_s, mu_r, sigma_r, sqrtm=sqrtm)
    swapped = frechet_distance(mu_r, sigma_r, mu_s, sigma_s, sqrtm=sqrtm)
    assert value == pytest.approx(case["fid_adm"], rel=case["rtol"]["fid"])
    assert swapped == pytest.approx(case["fid_adm_swapped"], rel=case["rtol"]["fid"])
    if not sqrtm:
        assert value == pytest.approx(case["fid_high_precision"], rel=1e-11)
    if "fid_edm2" in case:
        assert value == pytest.approx(case["fid_edm2"], rel=case["rtol"]["fid"])
        name, printed = case["edm2_printed"][1].split(" = ")  # with six digits
        assert name == "fid" and value == pytest.approx(float(printed), rel=max(case["rtol"]["fid"], 1e-5))


@BOTH
@pytest.mark.parametrize("name", DATA.get("frechet_unit_cases", {}))
def test_parity_frechet_unit(name, sqrtm):
    case = DATA["frechet_unit_cases"][name]
    arguments = [case[key] for key in ("mu1", "sigma1", "mu2", "sigma2")]
    if "raises" in case and sqrtm:
        with pytest.raises(ValueError, match=f"^{case['message']}$"):
            frechet_distance(*arguments, sqrtm=True)
        return
    # these two are no covariances; with eigenvalues clipped the root of the first vanishes
    without_sqrtm = {"eps_branch": 4.0, "imaginary_raises": 2.0}
    expected = case.get("fid_adm") if sqrtm or name not in without_sqrtm else without_sqrtm[name]
    assert frechet_distance(*arguments, sqrtm=sqrtm) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@ALL_CASES
def test_parity_inception_score(case):
    _, sample = features(case)
    classifier = torch.from_numpy(evaluation_inputs().classifier(sample.shape[1], case["classifier_scale"]))
    assert evaluation_inputs().sha256(classifier.numpy()) == case["classifier_sha256"]
    for size, key in ((5000, ""), (700, "_split700")):
        value = inception_score(sample, classifier, size)
        assert value == pytest.approx(case[f"inception_score_float64{key}"], rel=1e-10)
        assert value == pytest.approx(case[f"inception_score_adm{key}"], rel=case["rtol"]["inception_score"])


def test_parity_inception_score_splits():
    if "inception_score_splits" not in DATA:
        pytest.skip("no such case in this folder")
    case, make = DATA["inception_score_splits"], evaluation_inputs()
    rows = make.is_features()
    if make.sha256(rows) != case["sha256"]:
        pytest.skip("the random stream of this numpy differs")
    rows, classifier = torch.from_numpy(rows), torch.from_numpy(make.classifier(rows.shape[1]))
    for size, name in ((5000, "default_split"), (3000, "split3000"), (len(rows), "one_split")):
        value = inception_score(rows, classifier, size)
        assert value == pytest.approx(case[f"float64_{name}"], rel=1e-10)
        assert value == pytest.approx(case[f"adm_{name}"], rel=case["rtol"])
    parts = [inception_score(part, classifier) for part in rows.split(5000)]
    assert parts == pytest.approx(case["float64_default_split_parts"], rel=1e-10)


@pytest.mark.parametrize("precision", PRECISIONS)
@ALL_CASES
def test_parity_precision_recall(case, precision):
    inside = memberships(*features(case), dtype=PRECISIONS[precision])
    found = {"precision": inside[0], "recall": inside[1]}
    key = {"float16": "float16_fp32accum"}.get(precision, precision)
    for name, rows in found.items():
        expected, count = case[f"precision_recall_{key}"], int(rows.sum())
        slack = 1 if precision == "float16" else 0  # the order of a sum may move its rounding to float16
        assert abs(count - expected[f"{name}_count"]) <= slack
        assert rows.double().mean().item() == pytest.approx(expected[name], abs=slack / len(rows) + 1e-12)
        if precision == "float16":
            assert abs(count - case["precision_recall_adm_tf"][f"{name}_count"]) <= 1


@ALL_CASES
def test_parity_radii(case):
    for key, rows in zip(("ref", "sample"), features(case), strict=True):
        exact, half = radii(rows, dtype=torch.float64).numpy(), radii(rows, dtype=torch.float16).numpy()
        expected = case["radii_sq_float64"]
        assert exact[:3].tolist() == pytest.approx(expected[f"{key}_first3"], rel=1e-10)
        assert exact.mean() == pytest.approx(expected[f"{key}_mean"], rel=1e-10)
        expected = case["radii_sq_adm_tf"]
        used_float32 = rows.square().sum(dim=1).max() > HALF_MAX
        tolerance, of_mean = (1e-6, 1e-6) if used_float32 else (1e-3, 5e-4)  # 2**-10: a unit of float16
        if torch.equal(rows, rows.round()):
            tolerance = of_mean = 0
        assert half[:3].tolist() == pytest.approx(expected[f"{key}_first3"], rel=tolerance)
        assert half.astype(np.float64).mean() == pytest.approx(expected[f"{key}_mean"], rel=of_mean)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parity_integers(precision):
    if "integers_ref" not in ARRAYS:
        pytest.skip("no such arrays in this folder")
    dtype = PRECISIONS[precision]
    reference, sample = (torch.from_numpy(ARRAYS[f"integers_{key}"]).float() for key in ("ref", "sample"))
    for key, rows in (("ref", reference), ("sample", sample)):
        np.testing.assert_array_equal(radii(rows, dtype=dtype), ARRAYS[f"integers_{key}_radii_sq"])
    sample_inside, reference_inside = memberships(reference, sample, dtype=dtype)
    np.testing.assert_array_equal(sample_inside, ARRAYS["integers_sample_inside_ref_manifold"])
    np.testing.assert_array_equal(reference_inside, ARRAYS["integers_ref_inside_sample_manifold"])


@pytest.mark.parametrize("size", DATA.get("tf1_resize_299", {}))
def test_parity_resize(size):
    case = DATA["tf1_resize_299"][size]
    pixels = evaluation_inputs().image(*map(int, size.split("x")))
    assert evaluation_inputs().sha256(pixels) == case["image_sha256"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    resized = tf1_resize(image, size=(299, 299), align_corners=False)[0].permute(1, 2, 0)
    for point, value in case["points"].items():
        assert resized[ast.literal_eval(point)].item() == pytest.approx(value, abs=1e-4)
    assert resized.double().mean().item() == pytest.approx(case["mean_after_resize"], rel=1e-8)
    normalised = ((resized - 128) / 128).double().abs().sum().item()
    assert normalised == pytest.approx(case["abs_sum_after_norm"], rel=1e-8)


def synthetic_state():
    """The seeded weights of inception_synthetic, following their recipe."""
    g, digest, state = np.random.default_rng(SYNTHETIC["weights_seed"]), hashlib.sha256(), {}
    for name, shape in sorted(SYNTHETIC["state_dict_shapes"].items()):
        if name.endswith("running_var"):
            value = 0.5 + g.random(shape)
        elif name.endswith("conv.weight"):
            value = g.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.startswith("fc."):
            value = 0.05 * g.standard_normal(shape)
        else:
            value = name.endswith("bn.weight") + 0.1 * g.standard_normal(shape)
        value = value.astype("<f4")
        digest.update(name.encode() + value.tobytes())
        state[name] = torch.from_numpy(value)
    if digest.hexdigest() != SYNTHETIC["weights_sha256"]:
        pytest.skip("the random stream of this numpy differs")
    return state


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(synthetic_state(), path)
    return path


@pytest.fixture(scope="module")
def network(inception_weights):
    """All features that the network names."""
    return load_network(inception_weights, ("64", "192", "768", "2048", "logits_unbiased", "logits"))


@pytest.mark.parametrize("size", SYNTHETIC["expected"])
def test_parity_inception(inception_weights, network, size):
    make, shape = evaluation_inputs(), tuple(map(int, size.split("x")))
    pixels = np.stack([make.image(*shape, phase=0), make.image(*shape, phase=5)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    found = network.convert_features_tuple_to_dict(network(images))
    own = Inception(inception_weights)
    rows = own(images)
    found.update(spatial2023_nhwc=rows["spatial"])
    torch.testing.assert_close(rows["pool"], found["2048"], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(rows["pool"] @ own.classifier, found["logits_unbiased"], rtol=0, atol=5e-5)
    assert set(found) == set(SYNTHETIC["expected"][size])
    for name, expected in SYNTHETIC["expected"][size].items():
        rows = found[name].double().numpy()
        assert list(rows.shape) == expected["shape"]
        assert rows[0, :5].tolist() == pytest.approx(expected["image0_first5"], abs=5e-5)
        assert rows[1, -3:].tolist() == pytest.approx(expected["image1_last3"], abs=5e-5)
        assert np.abs(rows).mean() == pytest.approx(expected["abs_mean"], rel=3e-6)
        assert rows.sum() == pytest.approx(expected["sum"], abs=3e-6 * expected["abs_mean"] * rows.size)


@pytest.mark.parametrize("setting", EDM2["subset_of_25"])
def test_parity_subset(setting):
    options = {
        key: None if value == "None" else int(value) for key, value in (p.split("=") for p in setting.split(","))
    }
    assert choose_subset(25, options["num"], options["seed"]).tolist() == EDM2["subset_of_25"][setting]


@pytest.mark.parametrize("setting", EDM2["batch_sizes"])
def test_parity_batches(setting):
    options = {key: int(value) for key, value in (pair.split("=") for pair in setting.split(","))}
    batches = split_batches(np.arange(options["n"]), options["batch"], options["world"], options["rank"])
    assert [len(batch) for batch in batches] == EDM2["batch_sizes"][setting]

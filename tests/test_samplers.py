"""Samplers against reference values and against velocities with a closed-form answer."""

import itertools
import math
import re

import parity
import pytest
import torch

from common.errors import InputError
from models.paths import PATHS
from samplers import (
    SAMPLERS,
    BranchOptions,
    Guidance,
    GuidedVelocity,
    euler_step,
    heun_step,
    integrate,
    sample_labels,
    sample_noise,
    time_grid,
)

TOLERANCE = 5e-7
MEAN = torch.tensor([0.5, -0.3]).double()
COVARIANCE = torch.tensor([[0.25, 0.12], [0.12, 0.16]]).double()


def sample(name, velocity, x, num_steps, path=PATHS["linear"], noise=None):
    """Run a sampler of the table."""
    sampler = SAMPLERS[name]
    return integrate(sampler.step(path, noise), velocity, x, sampler.times(num_steps))


def velocity_of(function, guidance=None, rows=1, dtype=torch.float64):
    """The samplers' callable around a closed-form function (x, t, y) → velocity; condition 1, null condition 0."""
    y = torch.ones(rows, dtype=torch.long)
    return GuidedVelocity(function, y, torch.zeros_like(y), guidance, dtype)


def recorded_runs():
    """(prefix, steps, guidance scale) of every recorded SDE run."""
    prefixes = {key.rsplit("/", 1)[0] for key in parity.family("deepflow")[1] if key.startswith("sampler_sde_")}
    for prefix in sorted(prefixes):
        steps, scale = re.fullmatch(r"sampler_sde_steps(\d+)_cfg([\d.]+)", prefix).groups()
        yield prefix, int(steps), float(scale)


RUNS = list(recorded_runs())


def test_parity_sde_runs_are_there():
    assert RUNS or parity.FIXTURES != parity.OWN_FIXTURES


@pytest.mark.parametrize(("prefix", "steps", "scale"), RUNS, ids=[run[0] for run in RUNS])
def test_parity_sde(prefix, steps, scale):
    values = parity.arrays("deepflow", prefix)

    def network(x, t, y):
        assert x.dtype == t.dtype == torch.float32
        t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
        return 0.7 * x * torch.cos(3 * t) + 0.3 * t + 0.1 * (y % 7)

    y = values["y"]
    velocity = GuidedVelocity(network, y, torch.full_like(y, 1000), Guidance(scale, 0.1, 0.8))
    result = sample("sde", velocity, values["latents"], steps, noise=lambda i: values["noise"][i])
    assert result.dtype == torch.float64
    assert parity.relative_error(result, values["result"]) < TOLERANCE
    assert velocity.calls == steps


def gaussian(path, mean=MEAN, covariance=COVARIANCE):
    """Network whose data is N(mean, covariance), x (N, 2, 1, 1): with x_t ~ N(αμ, S), S = α²Σ + σ²I,
    v = α'·E[x_0 | x_t] + σ'·E[ε | x_t] = α'μ + (αα'Σ + σσ'I)·S⁻¹·(x − αμ)."""

    def network(x, t, _y):
        t = t[0]
        a, s, da, ds = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        eye = torch.eye(len(mean), dtype=torch.float64)
        gain = (a * da * covariance + s * ds * eye) @ torch.linalg.inv(a**2 * covariance + s**2 * eye)
        flat = x.flatten(1).double()
        return (da * mean + (flat - a * mean) @ gain.T).view_as(x)

    return network


@pytest.mark.parametrize("t", [0.04, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score_of_a_gaussian(path, t):
    path, t = PATHS[path], torch.tensor(t, dtype=torch.float64)
    x = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    v = gaussian(path)(x, t.expand(64), None)
    covariance = path.alpha(t) ** 2 * COVARIANCE + path.sigma(t) ** 2 * torch.eye(2).double()
    score = -(x.flatten(1) - path.alpha(t) * MEAN) @ torch.linalg.inv(covariance)
    torch.testing.assert_close(path.score(v, x, t).flatten(1), score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_samples_have_mean_and_covariance_of_a_gaussian(path):
    """The standard error is √(0.25/20000) = 0.0035 for a mean, at most √2·0.25/√20000 = 0.0025 for a covariance; the
    step size adds 0.0066 at most (the exact moments below). 0.0066 + 4 × 0.0035 = 0.02."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 2, 1, 1, generator=g, dtype=torch.float64)
    velocity = velocity_of(gaussian(PATHS[path]), rows=len(x))
    result = sample("sde", velocity, x, 100, PATHS[path], lambda _: torch.randn(x.shape, generator=g)).flatten(1)
    torch.testing.assert_close(result.mean(0), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(result.T.cov(), COVARIANCE, rtol=0, atol=0.02)
    assert velocity.calls == 100


def sde_moments(path, num_steps):
    """Exact mean and covariance after the SDE: it is affine in x and in every noise, so unit probes tell all of it.

    Row 0 starts at 0 without noise; rows 1, 2 start at a unit vector; each other row has one unit of noise once.
    """
    x = torch.zeros(3 + 2 * (num_steps - 1), 2, 1, 1, dtype=torch.float64)
    x[1:3] = torch.eye(2).view(2, 2, 1, 1)

    def noise(index):
        unit = torch.zeros_like(x)
        unit[3 + 2 * index : 5 + 2 * index] = torch.eye(2).view(2, 2, 1, 1)
        return unit

    out = sample("sde", velocity_of(gaussian(path), rows=len(x)), x, num_steps, path, noise).flatten(1)
    effects = out[1:] - out[0]
    return out[0], effects.T @ effects


def last_step_moments(path):
    """Mean and covariance when the noise-free step from t = 0.04 starts from the exact marginal there."""
    t = torch.tensor(0.04, dtype=torch.float64)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(3, 2, 1, 1)
    v = gaussian(path)(x, t.expand(3), None)
    out = (x - t * (v - t * path.score(v, x, t))).flatten(1)
    matrix = (out[1:] - out[0]).T
    covariance = path.alpha(t) ** 2 * COVARIANCE + path.sigma(t) ** 2 * torch.eye(2).double()
    return out[0] + matrix @ (path.alpha(t) * MEAN), matrix @ covariance @ matrix.T


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_has_the_moments_of_a_gaussian(path):
    """Without sampling error: only the last step, from 0.04 to 0, keeps the covariance 0.006 away from the data's."""
    for num_steps in (100, 250):
        mean, covariance = sde_moments(PATHS[path], num_steps)
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.003)
        torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.0066)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_converges_with_order_one_in_distribution(path):
    """Halving the steps halves the distance of the covariance to that of the last step from the exact marginal."""
    _, limit = last_step_moments(PATHS[path])
    errors = [(sde_moments(PATHS[path], n)[1] - limit).abs().max().item() for n in (100, 200, 400)]
    assert errors[-1] < 0.001
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("ode", ["ode", "ode-heun"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_ode_ends_exactly_at_a_point_target(num_steps, ode):
    """All data in one point: v = (x − x_0)/t is constant along its straight path, so any number of steps is exact."""
    target = torch.tensor([0.5, -0.25, 2.0, 0.0], dtype=torch.float64).view(1, 4, 1, 1)
    velocity = velocity_of(lambda x, t, y: (x - target) / t.view(-1, 1, 1, 1), rows=3)
    x = torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sample(ode, velocity, x, num_steps)
    torch.testing.assert_close(result, target.expand_as(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_ode_maps_a_gaussian_to_a_gaussian(path):
    """The flow of a 1-D Gaussian is monotone: noise z ends at μ + s·z."""
    mean, covariance = torch.tensor([0.5]).double(), torch.tensor([[0.09]]).double()
    velocity = velocity_of(gaussian(PATHS[path], mean, covariance), rows=5)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    result = sample("ode-heun", velocity, z, 200)
    torch.testing.assert_close(result, mean + 0.3 * z, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)], ids=["euler", "heun"])
def test_order_of_convergence(step, order):
    """dx/dt = x·cos(3t) gives x(t) = exp((sin 3t − sin 3)/3); to t = 0.5, so that Heun's plain last step stays out."""
    exact = math.exp((math.sin(1.5) - math.sin(3)) / 3)
    velocity = velocity_of(lambda x, t, y: x * torch.cos(3 * t).view(-1, 1, 1, 1))
    grids = [torch.linspace(1, 0.5, n + 1, dtype=torch.float64) for n in (20, 40, 80)]
    errors = [abs(integrate(step, velocity, torch.ones(1, 1, 1, 1), grid).item() - exact) for grid in grids]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(("ode", "order"), [("ode", 1), ("ode-heun", 2)])
def test_order_of_convergence_of_the_whole_ode(ode, order):
    """From 1 to 0, x(0) = exp(−sin 3 / 3); one plain Euler step of size 1/n costs O(1/n²) and spoils no order."""
    exact = math.exp(-math.sin(3) / 3)
    velocity = velocity_of(lambda x, t, y: x * torch.cos(3 * t).view(-1, 1, 1, 1))
    errors = [abs(sample(ode, velocity, torch.ones(1, 1, 1, 1), n).item() - exact) for n in (100, 200, 400)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


class RecordingNetwork:
    """x·y-dependent velocity that writes down the rows, dtypes, times and conditions of every call."""

    def __init__(self):
        self.rows, self.dtypes, self.times, self.conditions = [], set(), [], []

    def __call__(self, x, t, y):
        assert t.shape == y.shape == (len(x),)
        self.rows.append(len(x))
        self.dtypes |= {x.dtype, t.dtype}
        self.times.append(t[0].item())
        self.conditions.append(y.tolist())
        return x * torch.cos(t).view(-1, 1, 1, 1) + 0.1 * y.view(-1, 1, 1, 1)


FLOW_SAMPLERS = [name for name, sampler in SAMPLERS.items() if not sampler.is_map]


def step_noise(x):
    """Noise of step i, from i alone."""
    return lambda index: torch.randn(x.shape, generator=torch.Generator().manual_seed(index))


def run(sampler, guidance=None, num_steps=10, n=3, dtype=torch.float32):
    """(result, network, velocity) of a sampler on the recording network; y = 1, 2, 3 and null 7."""
    network = RecordingNetwork()
    y = torch.arange(1, n + 1)
    velocity = GuidedVelocity(network, y, torch.full_like(y, 7), guidance, dtype)
    x = torch.randn(n, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    return sample(sampler, velocity, x, num_steps, noise=step_noise(x)), network, velocity


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_guidance_of_one_is_bit_equal_to_none(sampler):
    plain, network, _ = run(sampler)
    off, network_off, velocity = run(sampler, Guidance(1.0, 0.2, 0.7))
    assert torch.equal(plain, off)
    assert network.rows == network_off.rows == [3] * velocity.calls
    assert velocity.guided_calls == 0


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_a_guided_step_is_one_call_of_2n_rows(sampler):
    _, network, velocity = run(sampler, Guidance(2.0, 0.25, 0.75))
    assert velocity.calls == len(network.rows)
    assert velocity.guided_calls == network.rows.count(6) > 0
    starts = network.times
    if sampler == "ode-heun":  # both evaluations of a step go by its start
        starts = SAMPLERS[sampler].times(10)[:-1].repeat_interleave(2)[:-1].tolist()
    for rows, t, conditions in zip(network.rows, starts, network.conditions, strict=True):
        guided = 0.25 <= t <= 0.75
        assert rows == (6 if guided else 3)
        assert conditions == ([1, 2, 3, 7, 7, 7] if guided else [1, 2, 3])


@pytest.mark.parametrize(("interval", "end"), [((0.75, 1.0), -2.0), ((0.0, 0.25), -1.5), ((0.5, 0.5), -1.5)])
def test_heun_guides_a_step_by_its_start(interval, end):
    """v = y, 3 where guided and 1 elsewhere, in four steps of 1/4: each guided step adds −3/4, any other −1/4.

    By the time of each evaluation the first two would end at −1.75: a step that enters or leaves would count half.
    """
    velocity = velocity_of(lambda x, t, y: y.view(-1, 1, 1, 1) + 0 * x, Guidance(3.0, *interval))
    assert sample("ode-heun", velocity, torch.zeros(1, 1, 1, 1), 4).item() == pytest.approx(end, abs=1e-15)


def test_the_ends_of_the_guidance_interval_are_guided():
    _, network, velocity = run("ode", Guidance(2.0, 0.25, 0.75), num_steps=4)
    assert network.times == [1.0, 0.75, 0.5, 0.25]
    assert network.rows == [3, 6, 6, 6]
    assert velocity.guided_calls == 3


def test_rounding_of_the_times_leaves_no_step_out():
    """0.3 of ten steps is 0.30000000000000004, and a shift can put the first time above 1."""
    exits = BranchOptions(exit_schedule="0.8:1,0.3:2")
    assert [exits.last(t, 3) for t in time_grid(10)] == [1, 1, *[2] * 5, *[3] * 4]
    assert all(time_grid(4, shift=shift / 100).max() <= 1 for shift in range(1, 300))


def test_guidance_is_u_plus_scale_times_difference():
    velocity = velocity_of(lambda x, t, y: x * y.view(-1, 1, 1, 1) + 3.0, Guidance(2.5), rows=2)
    x = torch.tensor([1.0, -2.0], dtype=torch.float64).view(2, 1, 1, 1)
    expected = 3.0 + 2.5 * x  # unconditional: 3, conditional: x + 3
    torch.testing.assert_close(velocity(x, torch.tensor(0.5)), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("sampler", "calls"), [("sde", 10), ("ode", 10), ("ode-heun", 19)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_model_evaluations_are_counted(sampler, calls, scale):
    _, network, velocity = run(sampler, Guidance(scale), num_steps=10)
    assert velocity.calls == len(network.rows) == calls
    assert velocity.guided_calls == (calls if scale != 1 else 0)


def test_heun_evaluates_at_both_ends_except_in_the_last_step():
    _, network, _ = run("ode-heun", num_steps=4)
    assert network.times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 250])
def test_time_grids(num_steps):
    sde, ode = SAMPLERS["sde"].times(num_steps), time_grid(num_steps)
    assert sde.dtype == ode.dtype == torch.float64
    assert len(sde) == len(ode) == num_steps + 1
    assert sde[0] == ode[0] == 1 and sde[-1] == ode[-1] == 0
    assert (sde.diff() < 0).all() and (ode.diff() < 0).all()
    if num_steps > 1:
        assert sde[-2].item() == 0.04
        torch.testing.assert_close(sde[:-1].diff(), torch.full((num_steps - 1,), -0.96 / (num_steps - 1)).double())
    torch.testing.assert_close(ode.diff(), torch.full((num_steps,), -1 / num_steps).double())


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_step_noise_is_asked_for_by_index_and_not_in_the_last_step(num_steps):
    asked = []

    def noise(index):
        asked.append(index)
        return torch.zeros(1, 1, 1, 1)

    sample("sde", velocity_of(lambda x, t, y: x), torch.ones(1, 1, 1, 1), num_steps, noise=noise)
    assert asked == list(range(num_steps - 1))


def test_step_noise_has_the_size_of_the_diffusion():
    """With v chosen so that the drift is 0, what is left is √(2t·|Δt|)·noise."""
    path = PATHS["linear"]

    def no_drift(x, t, _y):
        # score = (−(1−t)v − x)/t on the linear path, and v = t·score, so v = −x/(2 − t)
        return -x / (2 - t.view(-1, 1, 1, 1))

    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = sample("sde", velocity_of(no_drift), x, 4, path, lambda i: noise[i])
    t = SAMPLERS["sde"].times(4)
    expected = x + sum((2 * t[i] * (t[i] - t[i + 1])).sqrt() * noise[i] for i in range(3))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_state_is_float64_and_the_network_sees_its_own_dtype(sampler, dtype):
    result, network, _ = run(sampler, Guidance(1.5), dtype=dtype)
    assert result.dtype == torch.float64
    assert network.dtypes == {dtype, torch.promote_types(dtype, torch.float32)}  # x, t


def test_a_bfloat16_network_is_given_the_right_times():
    _, network, _ = run("sde", num_steps=250, dtype=torch.bfloat16)
    times = SAMPLERS["sde"].times(250)[:-1]
    torch.testing.assert_close(torch.tensor(network.times).double(), times, rtol=0, atol=1e-7)
    step = (times[0] - times[1]).item()
    assert (times.bfloat16().double() - times).abs().max() > 0.45 * step  # what casting t would do


def test_sampling_builds_no_graph():
    weight = torch.ones(1, requires_grad=True)
    result = sample("ode", velocity_of(lambda x, t, y: x * weight), torch.ones(1, 1, 1, 1), 3)
    assert not result.requires_grad


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_samples_do_not_depend_on_the_batch(sampler):
    together, _, _ = run(sampler, Guidance(2.0, 0.2, 0.8))
    network = RecordingNetwork()
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        velocity = GuidedVelocity(network, torch.tensor([i + 1]), torch.tensor([7]), Guidance(2.0, 0.2, 0.8))
        alone = sample(sampler, velocity, x[i : i + 1], 10, noise=lambda s, i=i: step_noise(x)(s)[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("guidance", "named"),
    [
        (Guidance(0.5), "--cfg-scale 0.5 must be finite and not below 1"),
        (Guidance(-1.0), "--cfg-scale -1.0"),
        (Guidance(float("nan")), "--cfg-scale nan"),
        (Guidance(float("inf")), "--cfg-scale inf"),
        (Guidance(2.0, 0.8, 0.2), "--guidance-low 0.8 and --guidance-high 0.2"),
        (Guidance(2.0, -0.1, 0.5), "--guidance-low -0.1"),
        (Guidance(2.0, 0.5, 1.1), "--guidance-high 1.1"),
        (Guidance(2.0, 0.51, 0.59), "guide no step"),
        (Guidance(2.0, 0.0, 0.05), "guide no step"),  # 0 is the end of the grid: nothing is evaluated there
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_guidance_that_makes_no_sense_is_refused(guidance, named):
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        guidance.check(time_grid(10))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(2.0, 0.6, 0.6), Guidance(4.0, 0.0, 1.0), Guidance(1.0, 0.51, 0.59)]
)
def test_guidance_that_makes_sense_is_accepted(guidance):
    guidance.check(torch.linspace(1, 0, 6, dtype=torch.float64))


def test_noise_is_a_function_of_seed_index_and_draw():
    shape = (4, 3, 3)
    together = sample_noise(5, [0, 1, 2, 900_000], 3, shape)
    assert together.dtype == torch.float32 and together.shape == (4, *shape)
    assert torch.equal(together[[3, 1]], sample_noise(5, [900_000, 1], 3, shape))
    streams = [
        sample_noise(seed, [i], draw, shape)[0, 0, 0, 0].item() for seed in (0, 5) for i in (0, 1) for draw in (0, 1, 2)
    ]
    assert len(set(streams)) == len(streams)


def test_noise_is_standard_normal_within_and_across_samples():
    """16,000 values: standard error 0.008 of the mean, 0.011 of the variance; 0.008 of a correlation."""
    noise = sample_noise(0, range(1000), 0, (4, 2, 2)).double()
    assert abs(noise.mean().item()) < 4 * 0.008
    assert abs(noise.var().item() - 1) < 4 * 0.011
    assert abs((noise[:-1] * noise[1:]).mean().item()) < 4 * 0.008
    assert abs((noise * sample_noise(0, range(1000), 1, (4, 2, 2))).mean().item()) < 4 * 0.008


def test_labels_are_a_function_of_seed_and_index():
    labels = sample_labels(3, range(1000), 10)
    assert labels.dtype == torch.int64
    assert torch.equal(labels[[7, 500]], sample_labels(3, [7, 500], 10))
    assert not torch.equal(labels, sample_labels(4, range(1000), 10))
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10 and (counts - 100).abs().max() < 4 * math.sqrt(1000 * 0.1 * 0.9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_stay_on_the_cpu_while_the_state_is_elsewhere(name, path):
    x = torch.empty(2, 4, 8, 8, device="meta")  # as on a GPU, only single numbers may come from the CPU
    result = sample(name, lambda x, t, *_, **__: x.float(), x, 3, PATHS[path], lambda _step: torch.zeros(x.shape))
    assert (result.device.type, result.shape, result.dtype) == ("meta", x.shape, torch.float64)

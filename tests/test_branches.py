"""Velocities of single branches, and sampling from them: guidance, early exits, times."""

import itertools
import math
import re

import pytest
import tiny
import torch

from common.errors import InputError
from models import create_model
from models.paths import PATHS
from samplers import SAMPLERS, BranchOptions, BranchVelocity, Guidance, GuidedVelocity, InternalGuidance, integrate
from samplers import time_grid as grid

SIZES = {"input_size": 4, "hidden_size": 32, "num_heads": 2, "depth": 4, "projector_dim": 12}
KEY_LAYERS = {2: (2,), 3: (1, 3)}
KINDS = {
    "class": ("DeepFlow-Ti/2", {"num_classes": 5}),
    "class, without VeRA": ("DeepFlow-Ti/2", {"num_classes": 5, "vera": "none"}),
    "aligned": ("DeepFlow-Ti/2", {"num_classes": 5, "ssl_align": True, "z_dims": (6,)}),
    "text": ("DeepFlow-MMDiT-Ti/2", {"context_dim": 6}),
}
FLOW_SAMPLERS = [name for name, sampler in SAMPLERS.items() if not sampler.is_map]


def make(kind="class", k=2):
    """A small model of k branches that is nowhere zero."""
    name, options = KINDS[kind]
    return tiny.fill_(create_model(name, **SIZES, **options, df_idxs=KEY_LAYERS[k]), std=0.2).eval()


def inputs(kind="class", k=2, n=4):
    """x, a time for each branch, and the condition."""
    g = torch.Generator().manual_seed(0)
    x, times = torch.randn(n, 4, 4, 4, generator=g), list(torch.rand(k, n, generator=g))
    return x, times, torch.randn(n, 3, 6, generator=g) if kind == "text" else torch.arange(n)


def rows_seen(model):
    """[(module's name, rows of its input)], filled by every call."""
    seen = []
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda _, given, __, name=name: seen.append((name, len(given[0]))))
    return seen


def under(names, *parents):
    return {name for name in names if f"{name}.".startswith(tuple(f"{parent}." for parent in parents))}


# ---- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", KEY_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_velocities_are_those_of_forward_without_what_training_reads(kind, k):
    model, (x, times, y) = make(kind, k), inputs(kind, k)
    expected = model(x, times, y).velocities
    seen = rows_seen(model)
    assert all(map(torch.equal, model.velocities(x, times, y), expected))
    called = {name for name, _ in seen}
    assert not under(called, "final_acc_layer", "projectors")
    assert under(called, "final_layer.0") and under(called, "final_layer.1")
    expected = model(x, times[0], y).velocities
    assert all(map(torch.equal, model.velocities(x, times[0], y), expected))
    (last,) = model.velocities(x, times[0], y, [k])
    assert torch.equal(last, expected[-1])


@pytest.mark.parametrize("k", KEY_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_of_a_branch_needs_nothing_beyond_it(kind, k):
    model, (x, times, y) = make(kind, k), inputs(kind, k)
    expected = model(x, times, y).velocities
    seen = rows_seen(model)
    blocks = "joint_blocks" if kind == "text" else "blocks"
    for branch in range(1, k + 1):
        seen.clear()
        assert torch.equal(model.velocity(x, times, y, branch=branch), expected[branch - 1])
        called = {name for name, _ in seen}
        assert {f"{blocks}.{i}" for i in range(4)} & called == {f"{blocks}.{i}" for i in range(model.ends[branch - 1])}
        assert {f"df_blocks.{i}" for i in range(k - 1)} & called == {f"df_blocks.{i}" for i in range(branch - 1)}
        assert under(called, "final_layer") == under(called, f"final_layer.{int(branch == k)}")
        assert not under(called, "final_acc_layer", "projectors")
    assert torch.equal(model.velocity(x, times, y), expected[-1])


@pytest.mark.parametrize("k", KEY_LAYERS)
def test_times_can_be_numbers(k):
    model, (x, _, y) = make(k=k), inputs(k=k)
    numbers = [0.5, 0.25, torch.tensor(0.75)][:k]
    tensors = [torch.full((4,), float(t)) for t in numbers]
    assert all(map(torch.equal, model.velocities(x, numbers, y), model.velocities(x, tensors, y)))
    assert torch.equal(model.velocity(x, 0.5, y, branch=1), model.velocity(x, tensors[0], y, branch=1))
    assert not torch.equal(model.velocity(x, numbers, y), model.velocity(x, 0.5, y))


@pytest.mark.parametrize("k", KEY_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_leave_after_the_branch_whose_time_has_them_last(kind, k):
    """Each row's velocities are those of a pass in which it is alone; blocks and VeRA run what is left."""
    model, (x, times, y) = make(kind, k), inputs(kind, k)
    apart = model.velocities(x[:2], [t[:2] for t in times], y[:2])
    first = model.velocity(x, times, y, branch=1)
    seen = rows_seen(model)
    found = model.velocities(x, [times[0], *[t[:2] for t in times[1:]]], y)
    assert [len(v) for v in found] == [4] + [2] * (k - 1)
    torch.testing.assert_close(found[0], first)
    for branch in range(1, k):
        torch.testing.assert_close(found[branch], apart[branch])
    rows, blocks = dict(seen), "joint_blocks" if kind == "text" else "blocks"
    assert [rows[f"{blocks}.{i}"] for i in range(4)] == [4 if i < model.ends[0] else 2 for i in range(4)]
    assert [rows[f"df_blocks.{i}"] for i in range(k - 1)] == [2] * (k - 1)


def test_a_branch_that_is_not_there_is_refused():
    sit = create_model("SiT-Ti/2", **SIZES, num_classes=5)
    x, (t, *_), y = inputs()
    assert torch.equal(sit.velocity(x, t, y, branch=1), sit.velocity(x, t, y))
    for model, branch, most in ((sit, 2, 1), (make(), 3, 2), (make(), 0, 2)):
        with pytest.raises(InputError, match=f"branch {branch} .* 1 to {most}"):
            model.velocity(x, t, y, branch=branch)


def test_a_flow_map_has_the_average_velocity_in_its_last_branch_alone():
    options = {**SIZES, "num_classes": 5, "df_idxs": (2,), "dmf_depth": 2}
    model = tiny.fill_(create_model("DeepFlow-DMF-S/2", **options), std=0.2)
    x, (t, r), y = inputs()
    first, last = model.velocities(x, (t, r), y)
    assert torch.equal(last, model.average_velocity(x, t, r, y))
    assert torch.equal(first, model.velocity(x, t, y, branch=1))


# ---- Sampling: plain options are plain samples ----------------------------------------------------------------------


def sample(sampler, velocity, x, steps=5):
    def noise(index):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(index))

    sampler = SAMPLERS[sampler]
    return integrate(sampler.step(PATHS["linear"], noise), velocity, x, sampler.times(steps))


def from_branches(model, options, y, guidance=None, y_null=None):
    y_null = torch.full_like(y, 5) if y_null is None else y_null
    return BranchVelocity(model.velocities, y, y_null, guidance, options=options, ends=model.ends)


PLAIN = {
    "nothing": lambda k: BranchOptions(),
    "scale 1": lambda k: BranchOptions(InternalGuidance(1.0, 0.2, 0.7, branch=1)),
    "exit of the unconditional half after the last": lambda k: BranchOptions(cfg_exit=k),
    "exit after the last": lambda k: BranchOptions(exit_branch=k),
    "schedule of the last": lambda k: BranchOptions(exit_schedule=f"0.5:{k}"),
    "gap 0": lambda k: BranchOptions(gap=0),
}


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, 0.3, 0.9)], ids=["unguided", "guided"])
@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("k", KEY_LAYERS)
def test_options_that_are_off_give_the_plain_samples_bit_for_bit(k, plain, guidance):
    model, (x, _, y), options = make(k=k), inputs(k=k), PLAIN[plain](k)
    for sampler in FLOW_SAMPLERS:
        options.check(k, SAMPLERS[sampler].times(5))
        usual = GuidedVelocity(model.velocity, y, torch.full_like(y, 5), guidance)
        velocity = from_branches(model, options, y, guidance)
        assert torch.equal(sample(sampler, velocity, x), sample(sampler, usual, x))
        assert (velocity.calls, velocity.guided_calls) == (usual.calls, usual.guided_calls)
        assert velocity.evaluations == usual.evaluations


def test_text_models_sample_from_branches():
    model, (x, _, y) = make("text", 3), inputs("text", 3)
    null, guidance = torch.zeros_like(y), Guidance(2.0)
    usual = sample("sde", GuidedVelocity(model.velocity, y, null, guidance), x)
    assert torch.equal(sample("sde", from_branches(model, BranchOptions(), y, guidance, null), x), usual)
    for options in (BranchOptions(cfg_exit=1), BranchOptions(InternalGuidance(2.0)), BranchOptions(gap="dt")):
        found = sample("sde", from_branches(model, options, y, guidance, null), x)
        assert found.isfinite().all() and not torch.equal(found, usual)


def test_sampling_from_branches_builds_no_graph():
    model, (x, _, y) = make(), inputs()
    options = BranchOptions(InternalGuidance(2.0), cfg_exit=1, gap="dt")
    assert model.velocity(x, 0.5, y).requires_grad
    assert not sample("sde", from_branches(model, options, y, Guidance(2.0)), x).requires_grad


# ---- Sampling: formulas ---------------------------------------------------------------------------------------------


def toy(branch, x, t, y):
    """What branch number `branch` of the toy network says."""
    t, y = (part.view(-1, 1, 1, 1).double() for part in (t, y))
    return x * torch.cos(t + branch) + branch**2 * t + 0.1 * y * branch


class ToyNetwork:
    """Branches that are known functions; writes down the branches, rows and times of every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y, branches):
        self.calls.append((branches, [len(t[branch - 1]) for branch in branches], [time[0].item() for time in t]))
        return [toy(b, x[: len(t[b - 1])], t[b - 1], y[: len(t[b - 1])]) for b in branches]


ENDS = (1, 3, 4)  # of the toy's branches: a quarter, three quarters and all of its blocks


def ask(options, t=0.5, guidance=None, **step):
    """(velocity at t, network, evaluations, c, u): c(branch) and u(branch) are the toy's, y = 1, 2 and 7 for null."""
    x, y = torch.tensor([[1.0], [-2.0]], dtype=torch.float64).view(2, 1, 1, 1), torch.tensor([1, 2])
    network, null = ToyNetwork(), torch.full_like(y, 7)
    velocity = BranchVelocity(network, y, null, guidance, torch.float64, options=options, ends=ENDS)
    found = velocity(x, torch.tensor(t, dtype=torch.float64), **step)
    c, u = (lambda b, y=y: toy(b, x, torch.full((2,), t, dtype=torch.float64), y) for y in (y, null))
    return found, network, velocity.evaluations, c, u


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("branch", "i"), [(None, 2), (1, 1)])
def test_internal_guidance_extrapolates_from_a_branch_in_one_pass(branch, i):
    options = BranchOptions(InternalGuidance(1.5, branch=branch))
    found, network, evaluations, c, _ = ask(options)
    equal(found, c(i) + 1.5 * (c(3) - c(i)))
    assert (network.calls, evaluations) == ([([i, 3], [2, 2], [0.5] * 3)], 1)


@pytest.mark.parametrize("t", [0.2, 0.4, 0.6, 0.7])
def test_internal_guidance_has_an_interval_of_its_own(t):
    options = BranchOptions(InternalGuidance(1.5, 0.4, 0.6))
    found, network, _, c, u = ask(options, t, Guidance(3.0, 0.6, 0.8))
    inside, guided = t in (0.4, 0.6), t >= 0.6
    first, second = (v(2) + 1.5 * (v(3) - v(2)) if inside else v(3) for v in (c, u))
    equal(found, second + 3.0 * (first - second) if guided else first)
    assert network.calls[0][0] == ([2, 3] if inside else [3])


def test_both_guidances_can_be_applied_in_either_order():
    found, _, evaluations, c, u = ask(BranchOptions(InternalGuidance(1.5)), guidance=Guidance(3.0))
    inner, last = (u(b) + 3.0 * (c(b) - u(b)) for b in (2, 3))
    equal(found, inner + 1.5 * (last - inner))
    assert evaluations == 2


@pytest.mark.parametrize("i", [1, 2])
def test_the_unconditional_half_can_end_early(i):
    found, network, evaluations, c, u = ask(BranchOptions(cfg_exit=i), guidance=Guidance(3.0))
    equal(found, u(i) + 3.0 * (c(3) - u(i)))
    assert network.calls == [([i, 3], [4, 2], [0.5] * 3)]
    assert evaluations == 1 + ENDS[i - 1] / 4


@pytest.mark.parametrize("i", [1, 2])
def test_a_half_that_ends_early_has_no_internal_guidance(i):
    options = BranchOptions(InternalGuidance(1.5), cfg_exit=i)
    found, _, evaluations, c, u = ask(options, guidance=Guidance(3.0))
    conditional = c(2) + 1.5 * (c(3) - c(2))
    equal(found, u(i) + 3.0 * (conditional - u(i)))
    assert evaluations == 1 + ENDS[i - 1] / 4


@pytest.mark.parametrize(("t", "last"), [(1.0, 1), (0.9, 1), (0.8, 2), (0.5, 2), (0.3, 3), (0.1, 3)])
def test_a_schedule_says_where_each_step_ends(t, last):
    options = BranchOptions(InternalGuidance(1.5), exit_schedule="0.8:1,0.3:2", cfg_exit=2)
    found, network, evaluations, c, u = ask(options, t, Guidance(3.0))
    conditional, unconditional = c(last), u(min(last, 2))
    if last == 3:
        conditional = c(2) + 1.5 * (c(3) - c(2))
    equal(found, unconditional + 3.0 * (conditional - unconditional))
    assert max(network.calls[0][0]) == last
    assert evaluations == (ENDS[last - 1] + ENDS[min(last, 2) - 1]) / 4


def test_one_exit_for_all_steps():
    found, network, evaluations, c, _ = ask(BranchOptions(exit_branch=2))
    equal(found, c(2))
    assert (network.calls[0][0], evaluations) == ([2], 0.75)


@pytest.mark.parametrize(
    ("gap", "t", "end", "expected"),
    [
        (0.1, 0.5, 0.25, [0.5, 0.6, 0.7]),
        (-0.1, 0.5, 0.25, [0.5, 0.4, 0.3]),
        (0.4, 0.5, 0.25, [0.5, 0.9, 1.0]),
        (-0.4, 0.5, 0.25, [0.5, 0.1, 0.0]),
        ("dt", 0.5, 0.25, [0.5, 0.375, 0.25]),
        ("dt", 0.5, None, [0.5, 0.5, 0.5]),
    ],
)
def test_times_of_the_branches(gap, t, end, expected):
    found, network, *_ = ask(BranchOptions(gap=gap), t, end=end)
    assert network.calls[0][2] == pytest.approx(expected, abs=1e-15)
    time = torch.full((2,), expected[2], dtype=torch.float64)
    x, y = torch.tensor([1.0, -2.0], dtype=torch.float64).view(2, 1, 1, 1), torch.tensor([1, 2])
    equal(found, toy(3, x, time, y))


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_the_last_branch_sees_where_the_step_arrives(sampler):
    """The second evaluation of a Heun step is there already; its early exit goes by the step's start."""
    network, y = ToyNetwork(), torch.tensor([1])
    options = BranchOptions(gap="dt", exit_schedule="0.5:1")
    velocity = BranchVelocity(network, y, y, options=options, ends=ENDS)
    sample(sampler, velocity, torch.ones(1, 1, 1, 1), 4)
    seen = []
    for t, t_next in itertools.pairwise(SAMPLERS[sampler].times(4).tolist()):
        corrected = sampler == "ode-heun" and t_next > 0
        seen += [(t, t_next, t), (t_next, t_next, t)] if corrected else [(t, t_next, t)]
    assert [call[0] for call in network.calls] == [[1] if start > 0.5 else [3] for *_, start in seen]
    for (_, _, found), (t, end, _) in zip(network.calls, seen, strict=True):
        assert found == pytest.approx([t, (t + end) / 2, end], abs=1e-6)


def test_blocks_of_a_real_model_are_counted_with_their_rows():
    model, (x, _, y) = make(k=3), inputs(k=3)
    seen = rows_seen(model)
    options = BranchOptions(cfg_exit=1, exit_schedule="0.6:2")
    velocity = from_branches(model, options, y, Guidance(2.0, 0.0, 0.8))
    sample("ode", velocity, x, 5)
    rows = sum(rows for name, rows in seen if re.fullmatch(r"blocks\.\d", name))
    assert velocity.evaluations == rows / (4 * 4)  # four blocks, four images
    assert velocity.evaluations == (3 + (3 + 1) + 3 * (4 + 1)) / 4


# ---- Sampling: mistakes ---------------------------------------------------------------------------------------------

EACH = {
    "--ig-scale": {"internal": InternalGuidance(2.0)},
    "--ig-branch": {"internal": InternalGuidance(branch=1)},
    "--cfg-exit": {"cfg_exit": 1},
    "--exit-branch": {"exit_branch": 1},
    "--exit-schedule": {"exit_schedule": "0.5:1"},
    "--branch-gap": {"gap": "dt"},
}


@pytest.mark.parametrize("flag", EACH)
def test_every_option_needs_branches_that_predict_velocities(flag):
    options = BranchOptions(**EACH[flag])
    options.check(2, grid(10))
    with pytest.raises(InputError, match=f"{flag} .*no key layers"):
        options.check(1, grid(10))
    with pytest.raises(InputError, match=f"{flag}.*flow map"):
        options.check(2, grid(10), "flow map")


def test_without_options_every_model_will_do():
    for k, kind in ((1, "flow"), (1, "flow map"), (3, "text"), (3, "flow map")):
        BranchOptions().check(k, grid(10), kind)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"internal": InternalGuidance(0.5)}, "--ig-scale 0.5"),
        ({"internal": InternalGuidance(float("nan"))}, "--ig-scale nan"),
        ({"internal": InternalGuidance(2.0, 0.8, 0.2)}, "--ig-low 0.8 and --ig-high 0.2"),
        ({"internal": InternalGuidance(2.0, 0.51, 0.59)}, "guide no step"),
        ({"internal": InternalGuidance(2.0, branch=3)}, "--ig-branch: branch 3 .* 1 to 2"),
        ({"internal": InternalGuidance(2.0, branch=0)}, "--ig-branch: branch 0 .* 1 to 2"),
        ({"internal": InternalGuidance(2.0), "exit_branch": 2}, "--exit-branch .*--ig-scale"),
        ({"internal": InternalGuidance(2.0), "exit_schedule": "0.05:2"}, "--exit-schedule .*--ig-scale"),
        ({"internal": InternalGuidance(2.0, 0.6, 1.0), "exit_schedule": "0.5:1"}, "--ig-low .* guide no step"),
        ({"cfg_exit": 4}, "--cfg-exit: branch 4 .* 1 to 3"),
        ({"cfg_exit": 0}, "--cfg-exit: branch 0 .* 1 to 3"),
        ({"exit_branch": 4}, "--exit-branch: branch 4 .* 1 to 3"),
        ({"exit_branch": 0}, "--exit-branch: branch 0 .* 1 to 3"),
        ({"exit_schedule": "0.8:1,0.3:4"}, "--exit-schedule: branch 4 .* 1 to 3"),
        ({"exit_branch": 1, "exit_schedule": "0.8:1"}, "--exit-branch and --exit-schedule"),
        *(({"exit_schedule": text}, "--exit-schedule .*0.8:1,0.3:2") for text in ("", "1", "0.8", "0.8:1:2", "0.8:x")),
        *(({"exit_schedule": text}, "--exit-schedule .*falling") for text in ("0.3:1,0.8:2", "0.5:1,0.5:2", "1:1")),
        *(({"exit_schedule": text}, "--exit-schedule .*falling") for text in ("nan:1", "-0.1:1", "1.5:1", "0.5:1,")),
        *(({"gap": gap}, f"--branch-gap {gap}.* dt or a number") for gap in (2, -1.01, math.nan, math.inf, "step")),
    ],
)
def test_options_that_make_no_sense_are_refused(options, named):
    with pytest.raises(InputError, match=named) as caught:
        BranchOptions(**options).check(3, grid(10))
    assert "\n" not in str(caught.value)

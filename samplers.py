"""Samplers: one loop over a time grid, one step function per method, guidance as a wrapper around the network.

Time runs from 1 (noise) to 0 (data). State, times, guidance and update are float64 (float32 on devices without it);
x is cast to the network's dtype for the call and its output back; t to that dtype too, but never below float32.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch

from common.errors import InputError


def time_grid(num_steps, last=0.0, shift=1.0):
    """num_steps + 1 times from 1 to 0, float64: even, with t ← s·t / (1 + (s − 1)·t) for a shift s.

    last > 0: even from 1 to `last`, and the last step goes from there to 0.
    """
    if last:
        even = torch.cat([torch.linspace(1, last, num_steps, dtype=torch.float64), torch.zeros(1).double()])
    else:
        even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * even / (1 + (shift - 1) * even)).clamp(max=1)  # rounding may exceed 1


@dataclasses.dataclass
class Guidance:
    """Classifier-free guidance u + scale·(c − u) on all channels, while low ≤ t ≤ high; scale 1 is off."""

    FLAGS = "--cfg-scale", "--guidance-low", "--guidance-high"

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def active(self, t):
        return self.scale != 1.0 and self.low <= float(t) <= self.high

    def extrapolate(self, weak, strong):
        return weak + self.scale * (strong - weak)

    def check(self, times):
        """Raise InputError if the settings make no sense or guide none of the evaluated times."""
        scale, low, high = self.FLAGS
        if not 1.0 <= self.scale < float("inf"):
            raise InputError(f"{scale} {self.scale} must be finite and not below 1; 1.0 is no guidance")
        interval = f"{low} {self.low} and {high} {self.high}"
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise InputError(f"{interval} must satisfy 0 <= low <= high <= 1 (t = 0 is data, t = 1 is noise)")
        if self.scale != 1.0 and not any(self.active(t) for t in times[:-1]):
            raise InputError(f"{interval} guide no step of this time grid; widen the interval")


@dataclasses.dataclass
class InternalGuidance(Guidance):
    """v_i + scale·(v_k − v_i), from an intermediate branch i to the last (arXiv 2512.24176); by default i = k − 1."""

    FLAGS = "--ig-scale", "--ig-low", "--ig-high"

    branch: int | None = None


@dataclasses.dataclass
class BranchOptions:
    """How the k branches of a network, counted from 1, are used: by default the last velocity, all at one time t."""

    internal: InternalGuidance = dataclasses.field(default_factory=InternalGuidance)
    cfg_exit: int | None = None  # the unconditional half of a guided call ends after this branch
    exit_branch: int | None = None  # every call ends after this branch
    exit_schedule: str | None = None  # "0.8:1,0.3:2": after branch 1 from noise down to t = 0.8, after 2 down to 0.3
    gap: float | str = 0.0  # from each branch's time to the next one's; "dt": the last is at the end of the step

    def __post_init__(self):
        if self.exit_schedule is not None and self.exit_branch is not None:
            raise InputError("--exit-branch and --exit-schedule exclude each other; pass one")
        self.exits = [] if self.exit_branch is None else [(0.0, self.exit_branch)]  # (t, branch that ends before it)
        if self.exit_schedule is not None:
            self.exits = parse_exits(self.exit_schedule)
        if self.gap != "dt" and not (isinstance(self.gap, float | int) and -1 <= self.gap <= 1):
            raise InputError(f"--branch-gap {self.gap}: it must be dt or a number from -1 to 1")

    def last(self, t, k):
        """The branch after which a step from t ends."""
        t = round(float(t), 6)  # a time grid's 0.30000000000000004 counts as 0.3
        return next((branch for end, branch in self.exits if t > end), k)

    def times(self, t, end, k):
        """Times of the k branches at t in a step to `end`: t_i = t + (i − 1)·gap in [0, 1]; dt is (end − t)/(k − 1)."""
        gap = (end - t) / (k - 1) if self.gap == "dt" else self.gap
        return [min(max(t + i * gap, 0.0), 1.0) for i in range(k)]

    def check(self, k, times, kind="flow"):
        """Raise InputError if this does not fit a network of k branches, its `kind`, or the sampler's times."""
        exits = "--exit-branch" if self.exit_schedule is None else "--exit-schedule"
        numbers = [("--ig-branch", self.internal.branch, k - 1), ("--cfg-exit", self.cfg_exit, k)]
        numbers += [(exits, branch, k) for _, branch in self.exits]
        used = [flag for flag, branch, _ in numbers if branch is not None]
        used += ["--ig-scale"] * (self.internal.scale != 1.0) + ["--branch-gap"] * (self.gap != 0)
        if used and k == 1:
            raise InputError(f"{used[0]} needs branches, and this model has no key layers; leave it out")
        if used and kind == "flow map":
            raise InputError(f"{used[0]}: only the last branch of a flow map predicts average velocities; leave it out")
        for flag, branch, most in numbers:
            if branch is not None and not 1 <= branch <= most:
                raise InputError(f"{flag}: branch {branch} is out of range; it must be from 1 to {most}")
        whole = [t for t in times[:-1] if self.last(t, k) == k]
        if self.internal.scale != 1.0 and not whole:
            raise InputError(f"{exits} leaves no step with the last branch, which --ig-scale needs; drop one of them")
        self.internal.check([*whole, times[-1]])


def parse_exits(text):
    """Pairs of a time and the branch that runs down to it: "0.8:1,0.3:2" → [(0.8, 1), (0.3, 2)]. Raises InputError."""
    try:
        exits = [(float(end), int(branch)) for end, branch in (part.split(":") for part in text.split(","))]
    except ValueError:
        exits = []
    ends = [1.0, *(end for end, _ in exits)]
    if not exits or not all(before > after >= 0 for before, after in itertools.pairwise(ends)):
        form = "it must be like 0.8:1,0.3:2, branch 1 down to t = 0.8 and then 2 down to 0.3, with falling t below 1"
        raise InputError(f"--exit-schedule {text!r}: {form}")
    return exits


class GuidedVelocity:
    """The callable that the steps see: (x, t) → velocity in the state's dtype, with guidance and a count.

    network(x, t, y): velocity of a batch, called with x in `dtype`; t (N,) is never coarser than float32, because
    rounding to bfloat16 moves a time by up to half a step of 250. y (N,): the condition; y_null (N,): the null one.
    A guided call is one forward pass of 2N rows. Over a flow map's average_velocity(x, t, r, y) this is
    (x, t, r) → average velocity, and the guidance interval is tested on t, the step's start.
    """

    def __init__(self, network, y, y_null, guidance=None, dtype=torch.float32):
        self.network, self.y, self.both = network, y, torch.cat([y, y_null])
        self.guidance, self.dtype = guidance or Guidance(), dtype
        self.calls = 0  # forward passes
        self.guided_calls = 0  # those of 2N rows

    @property
    def evaluations(self):
        """Model evaluations per image."""
        return self.calls + self.guided_calls

    @torch.no_grad()
    def __call__(self, x, *times, start=None, end=None):
        """start, end: of the step, if not the first of `times`; settings that depend on t use its start."""
        start, end = (float(times[0] if time is None else time) for time in (start, end))
        is_guided = self.guidance.active(start)
        self.calls += 1
        self.guided_calls += is_guided
        rows, y = x.to(self.dtype), self.y
        if is_guided:
            rows, y = torch.cat([rows, rows]), self.both
        conditional, unconditional = self.halves(rows, times, y, x, start, end)
        return self.guidance.extrapolate(unconditional, conditional) if is_guided else conditional

    def halves(self, rows, times, y, x, _start, _end):
        """Conditional and unconditional (no rows if unguided) velocities of x; rows: what the network gets."""
        times = [self.spread(t, rows) for t in times]
        return self.network(rows, *times, y).to(x.dtype).tensor_split([len(x)])

    def spread(self, t, rows):
        """A time for each of the rows."""
        time_dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.full((len(rows),), float(t), dtype=time_dtype, device=rows.device)


class BranchVelocity(GuidedVelocity):
    """A GuidedVelocity that uses the branches of a network as `options` say; by default it equals GuidedVelocity.

    network(x, t, y, branches): DeepFlow.velocities; ends: the network's blocks after which its k branches end.
    """

    def __init__(self, network, y, y_null, guidance=None, dtype=torch.float32, *, options, ends):
        super().__init__(network, y, y_null, guidance, dtype)
        self.options, self.ends = options, ends
        self.blocks = 0  # run so far, for N rows each

    @property
    def evaluations(self):
        """Model evaluations per image; one that exits early counts as its fraction of the blocks."""
        return self.blocks / self.ends[-1]

    def halves(self, rows, times, y, x, start, end):
        """One pass, as without branches; the unconditional half may exit early."""
        n, k, options, is_guided = len(x), len(self.ends), self.options, len(rows) > len(x)
        last = options.last(start, k)
        left = min(options.cfg_exit or last, last) if is_guided else last
        self.blocks += self.ends[last - 1] + is_guided * self.ends[left - 1]
        internal = options.internal if last == k and options.internal.active(start) else None
        inner = internal and (internal.branch or k - 1)
        branches = sorted({last, left, inner} - {None})
        times = enumerate(options.times(float(times[0]), end, k), 1)
        times = [self.spread(t, rows if branch <= left else x) for branch, t in times]
        v = dict(zip(branches, (v.to(x.dtype) for v in self.network(rows, times, y, branches)), strict=True))
        conditional, unconditional = v[last][:n], v[left][n:]
        if internal:
            conditional = internal.extrapolate(v[inner][:n], conditional)
            if left == k:
                unconditional = internal.extrapolate(v[inner][n:], unconditional)
        return conditional, unconditional


def euler_step(velocity, x, t, t_next, _index):
    """x + Δt·v."""
    return x + (t_next - t) * velocity(x, t, end=t_next)


def heun_step(velocity, x, t, t_next, _index):
    """Trapezoidal correction with a second evaluation at the next time; plain Euler into t = 0.

    The step's start decides for both evaluations whether they are guided, as in the published sampler.
    """
    v = velocity(x, t, end=t_next)
    predicted = x + (t_next - t) * v
    if t_next == 0:
        return predicted
    return x + (t_next - t) * 0.5 * (v + velocity(predicted, t_next, start=t))


def sde_step(path, noise):
    """Euler-Maruyama on the reverse SDE of diffusion w(t) = 2t: drift v − ½·w·score, noise √(w·|Δt|), none into t = 0.

    Guiding v guides the drift: the score is affine in v.
    """

    def step(velocity, x, t, t_next, index):
        dt, w = t_next - t, 2 * t
        v = velocity(x, t, end=t_next)
        x = x + dt * (v - 0.5 * w * path.score(v, x, t))
        return x if t_next == 0 else x + (w * dt.abs()).sqrt() * noise(index).to(x)

    return step


def map_step(average_velocity, x, t, t_next, _index):
    """x + Δt·u(x, t, t_next) along a flow map."""
    return x + (t_next - t) * average_velocity(x, t, t_next)


def restart_step(path, noise):
    """Jump to the data along a flow map, then back to the next time with fresh noise; none after the last jump."""

    def step(average_velocity, x, t, t_next, index):
        x0 = x - t * average_velocity(x, t, 0.0)
        if t_next == 0:
            return x0
        return path.alpha(t_next) * x0 + path.sigma(t_next) * noise(index).to(x)  # equation 1; t_next is one number

    return step


def integrate(step, velocity, x, times):
    """Carry x from times[0] to times[-1]; x (N, C, H, W), times descending. Returns x in the state's dtype."""
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # Apple's mps has no float64
    times = times.to(x.dtype)  # on the CPU: asking a GPU for a time would wait for the network's last call
    for index in range(len(times) - 1):
        x = step(velocity, x, times[index], times[index + 1], index)
    return x


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A time grid and a step."""

    num_steps: int  # by default
    step: Callable  # (path, noise) → step for `integrate`; noise(i): standard normal noise of step i, shaped like x
    last: float = 0.0  # of the time grid
    is_map: bool = False  # steps along a flow map's average velocity

    def times(self, num_steps, shift=1.0):
        """Time grid, float64 (num_steps + 1,)."""
        return time_grid(num_steps, self.last, shift)


SAMPLERS = {
    "sde": Sampler(250, sde_step, last=0.04),
    "ode": Sampler(50, lambda path, noise: euler_step),
    "ode-heun": Sampler(50, lambda path, noise: heun_step),
    "euler": Sampler(4, lambda path, noise: map_step, is_map=True),
    "restart": Sampler(4, restart_step, is_map=True),
}


def sample_noise(seed, indices, draw, shape):
    """Standard normal noise (N, *shape), float32, row i a pure function of (seed, indices[i], draw).

    draw 0 is the starting noise, draw i + 1 that of step i; so a sample depends neither on its batch nor its process.
    """
    # numpy's streams are the same on every machine; a sample's label uses [seed, index, 0, 1]
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in zip(noise, indices, strict=True):
        np.random.default_rng([seed, index, draw]).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def sample_labels(seed, indices, num_classes):
    """int64 labels (N,), drawn by (seed, index) alone."""
    return torch.tensor([int(np.random.default_rng([seed, index, 0, 1]).integers(num_classes)) for index in indices])

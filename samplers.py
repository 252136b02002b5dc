"""Samplers: one loop over a time grid, one step function per method, guidance as a wrapper around the network.

Time runs from 1 (noise) to 0 (data). State, times, guidance and update are float64 (float32 on devices without it);
x is cast to the network's dtype for the call and its output back; t to that dtype too, but never below float32.
"""

import dataclasses
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
    return shift * even / (1 + (shift - 1) * even)


@dataclasses.dataclass
class Guidance:
    """Classifier-free guidance u + scale·(c − u) on all channels, while low ≤ t ≤ high; scale 1 is off."""

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def active(self, t):
        return self.scale != 1.0 and self.low <= float(t) <= self.high

    def check(self, times):
        """Raise InputError if the settings make no sense or guide none of the evaluated times."""
        if not 1.0 <= self.scale < float("inf"):
            raise InputError(f"--cfg-scale {self.scale} must be finite and not below 1; 1.0 is no guidance")
        interval = f"--guidance-low {self.low} and --guidance-high {self.high}"
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise InputError(f"{interval} must satisfy 0 <= low <= high <= 1 (t = 0 is data, t = 1 is noise)")
        if self.scale != 1.0 and not any(self.active(t) for t in times[:-1]):
            raise InputError(f"{interval} guide no step of this time grid; widen the interval")


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
    def __call__(self, x, *times, interval_time=None):
        """interval_time: the time that the guidance interval is tested on; default: the first of `times`."""
        is_guided = self.guidance.active(times[0] if interval_time is None else interval_time)
        state, x = x.dtype, x.to(self.dtype)
        self.calls += 1
        self.guided_calls += is_guided
        x, y = (torch.cat([x, x]), self.both) if is_guided else (x, self.y)
        time_dtype = torch.promote_types(self.dtype, torch.float32)
        times = [torch.full((len(x),), float(t), dtype=time_dtype, device=x.device) for t in times]
        velocity = self.network(x, *times, y).to(state)
        if not is_guided:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.guidance.scale * (conditional - unconditional)


def euler_step(velocity, x, t, t_next, _index):
    """x + Δt·v."""
    return x + (t_next - t) * velocity(x, t)


def heun_step(velocity, x, t, t_next, _index):
    """Trapezoidal correction with a second evaluation at the next time; plain Euler into t = 0.

    The step's start decides for both evaluations whether they are guided, as in the published sampler.
    """
    v = velocity(x, t)
    predicted = x + (t_next - t) * v
    if t_next == 0:
        return predicted
    return x + (t_next - t) * 0.5 * (v + velocity(predicted, t_next, interval_time=t))


def sde_step(path, noise):
    """Euler-Maruyama on the reverse SDE of diffusion w(t) = 2t: drift v − ½·w·score, noise √(w·|Δt|), none into t = 0.

    Guiding v guides the drift: the score is affine in v.
    """

    def step(velocity, x, t, t_next, index):
        dt, w = t_next - t, 2 * t
        v = velocity(x, t)
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
        return x0 if t_next == 0 else path.interpolate(x0, noise(index).to(x), t_next)

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

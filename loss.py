"""The training objectives: deep supervision and acceleration (equations 4 to 10), SSL alignment, flow maps.

Letters: N batch, C latent channels, H = W latent size, k branches. Losses are fp32 whatever the autocast: the
networks' outputs are cast here.
"""

import dataclasses
import itertools

import numpy as np
import torch
import torch.nn.functional as F


def sample_times(rng, n, num_branches, weighting, path, tg_upper_bound):
    """Draw the k times of n samples (section 3.2.2), float32 (k, N) in [0, 1].

    t_1 is uniform, or such that log σ/α is a standard normal (on the linear path the logistic of one);
    t_{i+1} = clamp(t_i ± u, 0, 1) with u ~ U(0, tg_upper_bound) and one sign for the whole batch, as in the release.
    weighting: uniform or lognormal; rng: numpy Generator.
    """
    times = [rng.random(n) if weighting == "uniform" else path.time_of_ratio(np.exp(rng.standard_normal(n)))]
    sign = 1 if rng.random() < 0.5 else -1
    for _ in range(num_branches - 1):
        times.append(np.clip(times[-1] + sign * rng.random(n) * tg_upper_bound, 0, 1))
    return torch.from_numpy(np.stack(times).astype(np.float32))


def mean_square(error):
    """(N, C, H, W) → (N,), mean over C, H, W."""
    return error.square().flatten(1).mean(dim=1)


@dataclasses.dataclass
class DeepFlowLoss:
    """Unweighted parts per branch and sample, and their weighted sums per sample."""

    velocity: torch.Tensor  # (k, N), mean((v_i − V)²)
    acceleration: torch.Tensor  # (k − 1 or 0, N), mean((x_{ti} − v_i·t_i + ½·a_i·t_i² − x_0)²), equation 7
    deep: torch.Tensor  # (N,), Σ_i β_i · velocity_i, equation 5
    total: torch.Tensor  # (N,), deep + λ · Σ_i acceleration_i, equation 10

    def parts(self):
        """Batch means by name, for the log."""
        named = {"loss_v": self.velocity, "loss_a": self.acceleration}
        return {f"{name}{i}": row.detach().mean() for name, rows in named.items() for i, row in enumerate(rows, 1)}


def deepflow_loss(out, x0, noise, times, path, branch_weights, acc_coeff, target=None):
    """Deep supervision with acceleration (equation 10), as DeepFlowLoss.

    out: DeepFlowOutput at x_{t1}; x0, noise (N, C, H, W) fp32; times (k, N); branch_weights β: k floats; acc_coeff λ;
    target: another velocity (N, C, H, W) than the path's. Times that are all equal make equation 5 equation 4; with
    k = 1 it is flow matching (equations 2 and 3).
    """
    target = path.velocity(x0, noise, times[0]) if target is None else target
    velocities = [v.float() for v in out.velocities]
    velocity = torch.stack([mean_square(v - target) for v in velocities])  # (k, N)
    deep = sum(weight * row for weight, row in zip(branch_weights, velocity, strict=True))  # equation 5
    refinements = [  # v is detached: the step's error is for the acceleration to learn, v has a target of its own
        mean_square(extrapolate(path.interpolate(x0, noise, t), v.detach(), a.float(), t) - x0)  # equation 7
        for v, a, t in zip(velocities, out.accelerations, times, strict=False)  # not of the final branch
    ]
    acceleration = torch.stack(refinements) if refinements else velocity[:0]  # (k − 1 or 0, N)
    return DeepFlowLoss(velocity, acceleration, deep, deep + acc_coeff * acceleration.sum(dim=0))  # equation 10


def extrapolate(x, v, a, t):
    """Second-order step from time t to the data (equation 7): x + v·(0 − t) + ½·a·(0 − t)²."""
    dt = (0 - t).view(-1, 1, 1, 1)
    return x + v * dt + 0.5 * a * dt**2


def alignment_loss(projections, features):
    """Minus the cosine similarity of matching tokens, averaged over tokens and batch (REPA): (m·E,), one per pair.

    projections: m·E tensors (N, T, Z) from m places in the network, encoder by encoder; features: E tensors (N, T, Z).
    """
    if not features or len(projections) % len(features):
        raise ValueError(f"{len(projections)} projections do not fit {len(features)} encoders")
    pairs = zip(projections, itertools.cycle(features), strict=False)
    return torch.stack([-F.cosine_similarity(p.float(), f.float(), dim=-1).mean() for p, f in pairs])


def flow_map_times(normals, means, stds):
    """Times of a flow map's two parts, float32 (3, N) in [0, 1]: t of the flow part, then t ≥ r of the mean-flow part.

    Each is logistic-normal. normals (3, N): standard normal numbers for t_fm, t, r; means, stds: 3 floats each.
    """
    means, stds = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (means, stds))
    t_fm, t, r = torch.sigmoid(means + stds * normals)
    return torch.stack([t_fm, torch.maximum(t, r), torch.minimum(t, r)])


def guided_samples(kind, times, dropped, low, high):
    """Which samples are guided in the flow part and in the mean-flow part, (2, N) bool.

    kind: default, mg or distill; times (3, N) from `flow_map_times`; dropped (N,) bool: samples without their label,
    which model guidance (mg) leaves out; low, high: interval of t, tested for each part.
    """
    if kind == "default":
        return torch.zeros(2, len(dropped), dtype=torch.bool)
    inside = (low <= times[:2]) & (times[:2] <= high)
    return inside & ~dropped if kind == "mg" else inside


@dataclasses.dataclass
class GuidedTarget:
    """The velocity v* that a flow map learns (`--g-type`), guided with weight ω.

    velocity(x, t, y): the flow map's own (mg) or a frozen flow model's (distill); null_class: the null label.
    """

    kind: str = "default"
    omega: float = 0.0
    velocity: object = None
    null_class: int | None = None

    @torch.no_grad()
    def __call__(self, v, x, t, y, guided):
        """v* (M, C, H, W); v: dx_t/dt; guided: (M,) bool, on the CPU so that reading it does not wait for the device.

        mg: v + ω·(u(y) − u(null)) where guided, else v; distill: the teacher's u(null) + ω·(u(y) − u(null)), else u(y).
        Only the rows that this needs pass through the network, M/4 at a time, so that a compiled one sees one shape.
        """
        m, guided = len(x), guided.nonzero().flatten()
        conditional = {"default": guided[:0], "mg": guided, "distill": torch.arange(m)}[self.kind]
        if not len(conditional):
            return v
        size, rows = -(-m // 4), torch.cat([conditional, guided + m])  # i + m: row i without its label
        rows = F.pad(rows, (0, -len(rows) % size)).to(x.device, non_blocking=True)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        u = torch.cat([self.velocity(x[part % m], t[part % m], labels[part]) for part in rows.split(size)]).float()
        u, unconditional, _ = u.tensor_split([len(conditional), len(conditional) + len(guided)])
        where = rows[len(conditional) :][: len(guided)] - m
        if self.kind == "mg":
            return v.index_add(0, where, self.omega * (u - unconditional))
        return u.index_add(0, where, (self.omega - 1) * (u[where] - unconditional))


@dataclasses.dataclass
class FlowMapTargets:
    """Inputs and targets of one training pass: N rows of the flow part, then N of the mean-flow part."""

    x: torch.Tensor  # (2N, C, H, W)
    t: torch.Tensor  # (2N,)
    r: torch.Tensor  # (2N,), t in the flow part
    y: torch.Tensor  # (2N,)
    target: torch.Tensor  # (2N, C, H, W) float32
    derivative: torch.Tensor  # (N, C, H, W) float32, d/dt u in the mean-flow part
    guided: torch.Tensor  # (), share of guided samples


@torch.no_grad()
def flow_map_targets(model, guide, x0, y, draws, path):
    """FlowMapTargets of a batch, without gradient: v* for the flow part, v* + (r − t)·d/dt u for the mean-flow part.

    model: the bare FlowMap; guide: GuidedTarget; x0 (N, C, H, W); y (N,): labels after dropping; draws: `times`
    (3, N), `noise` and `map_noise` (N, C, H, W), `guided` (2, N) on the CPU.
    """
    (t_fm, t, r), n = draws.times, len(x0)
    x0, y, noise, times = (torch.cat(pair) for pair in ((x0, x0), (y, y), (draws.noise, draws.map_noise), (t_fm, t)))
    x = path.interpolate(x0, noise, times)
    v_fm, v = guide(path.velocity(x0, noise, times), x, times, y, draws.guided.flatten()).chunk(2)
    derivative = model.derivative(x[n:], t, r, y[n:], v)[1].float()
    target = torch.cat([v_fm, v + (r - t)[:, None, None, None] * derivative])
    share = x.new_full((), draws.guided.float().mean().item())
    return FlowMapTargets(x, times, torch.cat([t_fm, r]), y, target, derivative, share)


def adaptive_loss(error, log_variance):
    """log(e·exp(−s) + 0.01) + s of mean squared errors e and log-variances s, (N,) each.

    Computed as log(e + 0.01·exp(s)), which is equal and stays finite: training drives s down without limit.
    """
    return torch.log(error + 0.01 * torch.exp(log_variance))


@dataclasses.dataclass
class FlowMapLoss:
    """Per sample: squared errors of the two parts, their adaptive losses, and the mean of these."""

    error: torch.Tensor  # (2, N), Σ over C, H, W of (u − target)²
    adaptive: torch.Tensor  # (2, N)
    total: torch.Tensor  # (N,), (adaptive_1 + adaptive_2) / 2


def flow_map_loss(u, log_variance, target):
    """FlowMapLoss of u and target (2N, C, H, W), log_variance (2N,): flow part first."""
    square = (u.float() - target).square().flatten(1)  # (2N, C·H·W)
    adaptive = adaptive_loss(square.mean(dim=1), log_variance.float()).unflatten(0, (2, -1))
    error = square.sum(dim=1).unflatten(0, (2, -1))
    return FlowMapLoss(error, adaptive, 0.5 * adaptive.sum(dim=0))

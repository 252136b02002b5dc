"""Time and memory of a flow map's training step by its parts, beside a flow model's step, as measured in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.dmf_step                           # CPU, fp32
    python -m benchmarks.dmf_step --model DMFT-XL/2 --batch-size 64            # GPU, bf16

Both steps use the same network and batch, eager and compiled. Parts: guidance (of two thirds of the 2N rows, which is
the average with default flags), derivative (the Jacobian-vector product), forward and backward (2N rows). In passes of
N rows, a flow step has 1 forward and 1 backward, worth about 3 forward passes; a flow map's has 2 to 3 for guidance, a
derivative worth 2, 2 forward and 2 backward, worth about 11. Times are medians of interleaved repeats.
"""

import dataclasses

import torch

from benchmarks.steps import PATH, StepFlags, begin, latent_shape, our_loss
from benchmarks.timing import (
    DEVICE,
    ON_GPU,
    interleaved_times,
    median_ratio,
    medians_of,
    peak_gpu_memory,
    print_table,
)
from common.errors import exit_on_input_error
from common.flags import Range, flag
from loss import GuidedTarget, flow_map_loss, flow_map_targets, flow_map_times
from models import create_model, model_config
from models.compiling import compile_blocks
from models.deepflow import DeepFlow
from training.draws import FlowMapDraws


@dataclasses.dataclass(kw_only=True)
class FlowMapStepFlags(StepFlags):
    """Flags of this program."""

    model: str = flag("DMFT-B/2" if ON_GPU else "DMFT-S/2", "a preset of flow maps", group="model")
    batch_size: int = flag(64 if ON_GPU else 4, "images of a step", range=Range(low=1), group="optimisation")


class Bench:
    """A flow map and the flow model of the same sizes, with one batch."""

    def __init__(self, args, compiled):
        options = model_config(args.model)
        self.autocast, n = args.autocast, args.batch_size
        self.model = create_model(args.model, **options).to(DEVICE)
        flow_options = {name: value for name, value in options.items() if name not in ("dmf_depth", "use_logvar")}
        self.flow = DeepFlow(**flow_options).to(DEVICE)
        g = torch.Generator().manual_seed(0)
        self.x0, posterior, noise, map_noise = torch.randn(4, *latent_shape(options, n), generator=g).to(DEVICE)
        times = flow_map_times(torch.randn(3, n, generator=g), (0.0, 0.4, -1.2), (1.0, 1.0, 1.0)).to(DEVICE)
        self.y = torch.randint(options["num_classes"], (n,), generator=g).to(DEVICE)
        drop, guided = torch.zeros(n, dtype=torch.bool), (torch.arange(2 * n) < round(4 * n / 3)).view(2, n)
        self.draws = FlowMapDraws(times, drop, posterior, noise, map_noise, guided)
        self.model.supervise_branches(False)
        if compiled:
            compile_blocks(self.model)
            compile_blocks(self.flow)
            self.model.compile_derivative()
        self.guide = GuidedTarget("mg", 0.6, self.counted(self.model.velocity), options["num_classes"])
        self.rows = 0
        self.targets = self.make_targets(GuidedTarget())

    def counted(self, velocity):
        """`velocity`, adding up the rows it is called with."""

        def call(x, t, y):
            self.rows += len(x)
            return velocity(x, t, y)

        return call

    def make_targets(self, guide):
        with self.autocast():
            return flow_map_targets(self.model, guide, self.x0, self.y, self.draws, PATH)

    def guidance(self):
        times, noise = self.draws.times[:2].flatten(), torch.cat([self.draws.noise, self.draws.map_noise])
        x0, y = torch.cat([self.x0, self.x0]), torch.cat([self.y, self.y])
        with self.autocast():
            self.guide(noise - x0, PATH.interpolate(x0, noise, times), times, y, self.draws.guided.flatten())

    def derivative(self):
        _, t, r = self.draws.times
        with self.autocast():
            self.model.derivative(self.x0, t, r, self.y, self.draws.noise)

    def forward(self):
        targets = self.targets
        with self.autocast():
            out = self.model(targets.x, targets.t, targets.y, targets.r)
        return flow_map_loss(out.velocities[-1], out.log_variance, targets.target).total.mean()

    def gradient(self):
        self.forward().backward()
        self.model.zero_grad()

    def whole(self):
        self.targets = self.make_targets(self.guide)
        self.gradient()

    def flow_step(self):
        times = self.draws.times[:1].expand(self.flow.num_branches, -1)
        with self.autocast():
            loss = our_loss(self.flow, self.x0, self.draws.noise, times, self.y)
        loss.backward()
        self.flow.zero_grad()

    def parts(self):
        """{name: callable}."""
        return {
            "flow step": self.flow_step,
            "flow map step": self.whole,
            "  guidance": self.guidance,
            "  derivative": self.derivative,
            "  forward": self.forward,
            "  forward and backward": self.gradient,
        }


def main():
    args = begin(FlowMapStepFlags, __doc__)
    rows = []
    for how in args.hows:
        bench = Bench(args, how == "compiled")
        parts = bench.parts()
        times = interleaved_times(parts, args.repeats)
        bench.rows = 0
        bench.guidance()
        for name, seconds in medians_of(times).items():
            ratio = f"{median_ratio(times, name, 'flow step'):.2f}"
            memory = f"{peak_gpu_memory(parts[name]):,.0f}" if ON_GPU else "–"
            rows.append([name, how, f"{seconds * 1e3:.1f}", ratio, memory])
        print(f"{how}: guidance passed {bench.rows / args.batch_size:g} N rows through the network", flush=True)
    print_table(["part", "", "ms", "x flow step", "peak MB"], rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

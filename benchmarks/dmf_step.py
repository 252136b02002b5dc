"""Time and memory of a flow map's training step by its parts, beside a flow model's step, as measured in one run.

    OMP_NUM_THREADS=2 python benchmarks/dmf_step.py                           # CPU, fp32
    python benchmarks/dmf_step.py --model DMFT-XL/2 --batch-size 64            # GPU, bf16

Both steps are of the same network and batch, eager and compiled. Parts: guidance (one pass of 2N rows for the flow
part, one for the mean-flow part), derivative (the Jacobian-vector product), forward and backward (2N rows). Passes are
counted in N rows: a flow step is 1 forward and 1 backward, about 3 forwards' worth; a flow map's is 4 of guidance, a
derivative worth 2, 2 forward and 2 backward, about 12. Times are medians of interleaved repeats.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import describe_machine, interleaved_times, median_ratio, medians_of, print_table
from common.errors import exit_on_input_error
from common.precision import set_math
from loss import GuidedTarget, deepflow_loss, flow_map_loss, flow_map_targets, flow_map_times
from models import create_model, model_config
from models.deepflow import DeepFlow
from models.paths import PATHS
from training.draws import FlowMapDraws

PATH = PATHS["linear"]


class Bench:
    """A flow map and the flow model of the same sizes, with one batch."""

    def __init__(self, args, device, compiled):
        options = model_config(args.model)
        self.device, self.precision, n = device, args.precision, args.batch_size
        self.model = create_model(args.model, **options).to(device)
        flow_options = {name: value for name, value in options.items() if name not in ("dmf_depth", "use_logvar")}
        self.flow = DeepFlow(**flow_options).to(device)
        g = torch.Generator().manual_seed(0)
        shape = (n, options["in_channels"], options["input_size"], options["input_size"])
        self.x0, posterior, noise, map_noise = torch.randn(4, *shape, generator=g).to(device)
        times = flow_map_times(torch.randn(3, n, generator=g), (0.0, 0.4, -1.2), (1.0, 1.0, 1.0)).to(device)
        self.y = torch.randint(options["num_classes"], (n,), generator=g).to(device)
        drop, guided = torch.zeros(n, dtype=torch.bool), torch.ones(2, n, dtype=torch.bool)
        self.draws = FlowMapDraws(times, drop, posterior, noise, map_noise, guided)
        self.model.supervise_branches(False)
        velocity = self.model.velocity
        if compiled:
            self.model.compile(fullgraph=True)
            self.flow.compile(fullgraph=True)
            self.model.compile_derivative()
            velocity = torch.compile(velocity, fullgraph=True)
        self.guide = GuidedTarget("mg", 0.6, self.counted(velocity), options["num_classes"])
        self.rows = 0
        self.targets = self.make_targets(GuidedTarget())

    def counted(self, velocity):
        """`velocity`, adding up the rows it is called with."""

        def call(x, t, y):
            self.rows += len(x)
            return velocity(x, t, y)

        return call

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def make_targets(self, guide):
        with self.autocast():
            return flow_map_targets(self.model, guide, self.x0, self.y, self.draws, PATH)

    def guidance(self):
        with self.autocast():
            parts = zip(self.draws.times[:2], (self.draws.noise, self.draws.map_noise), self.draws.guided, strict=True)
            for t, noise, guided in parts:
                self.guide(noise - self.x0, PATH.interpolate(self.x0, noise, t), t, self.y, guided)

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
        k = self.flow.num_branches
        times = self.draws.times[:1].expand(k, -1)
        with self.autocast():
            out = self.flow(PATH.interpolate(self.x0, self.draws.noise, times[0]), list(times), self.y)
        weights = [0.2] * (k - 1) + [1.0]
        deepflow_loss(out, self.x0, self.draws.noise, times, PATH, weights, 1.0).total.mean().backward()
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


def peak_memory(run, device):
    """Peak GPU memory of a call in MB; nothing on a CPU."""
    if device.type != "cuda":
        return "–"
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return f"{torch.cuda.max_memory_allocated(device) / 1e6:,.0f}"


def parse():
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DMFT-B/2" if on_gpu else "DMFT-S/2", help="a preset of flow maps")
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16" if on_gpu else "no")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5, help="interleaved; medians are printed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled too")
    return parser.parse_args()


def main():
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_math(allow_tf32=True)
    print(f"{args.model}, batch {args.batch_size}, precision {args.precision}, {describe_machine(device)}", flush=True)
    rows = []
    for how in ("eager", "compiled") if args.compile else ("eager",):
        bench = Bench(args, device, how == "compiled")
        times = interleaved_times(bench.parts(), args.repeats, device)
        bench.rows = 0
        bench.guidance()
        for name, seconds in medians_of(times).items():
            ratio = f"{median_ratio(times, name, 'flow step'):.2f}"
            rows.append([name, how, f"{seconds * 1e3:.1f}", ratio, peak_memory(bench.parts()[name], device)])
        print(f"{how}: guidance passed {bench.rows / args.batch_size:g} N rows through the network", flush=True)
    print_table(["part", "", "ms", "x flow step", "peak MB"], rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

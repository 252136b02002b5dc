"""Decoupled MeanFlow: a flow model's network that predicts average velocities u(x_t, t, r, y) (Lee, Yu, Shin).

x_r = x_t + (r − t)·u; with r = t, u is the flow's velocity. The first blocks see t, the later ones and the velocity
layer see r. In a DeepFlow, the branches up to a key layer see t, the later ones r, and the VeRA block between them sees
the gap r − t.

Letters: N batch, C latent channels, H = W latent size, T tokens, D hidden size, k branches.
"""

import torch
from torch import nn

from common.errors import InputError
from models.attention import forward_mode
from models.deepflow import DeepFlow, DeepFlowOutput, per_block
from models.layers import sinusoid, zero_

LOGVAR_FREQUENCIES = 64


class FlowMap(DeepFlow):
    """The network. dmf_depth: number of blocks that see t; use_logvar: with the head that only training needs."""

    kind = "flow map"

    def __init__(self, *args, dmf_depth=20, use_logvar=True, **options):
        super().__init__(*args, **options)
        possible = self.df_idxs or range(1, len(self.blocks))  # some blocks, or whole branches, are left to see r
        if dmf_depth not in possible:
            raise InputError(f"--dmf-depth {dmf_depth}: the last block that sees t can be one of {list(possible)}")
        self.dmf_depth = dmf_depth
        self.deep_supervision = True  # whether `forward` runs the intermediate layers
        self.logvar_linear = nn.Linear(4 * LOGVAR_FREQUENCIES, 1) if use_logvar else None
        if use_logvar:
            zero_(self.logvar_linear)  # as the release: s = 0 at the start

    def forward(self, x, t, y, r=None):
        """DeepFlowOutput at x (N, C, H, W), t ≥ r (N,) in [0, 1], y (N,); without r, r = t: the flow."""
        r = t if r is None else r
        branches = list(self.run_branches(x, (t, r), y))
        velocities, accelerations = self.outputs(branches if self.deep_supervision else branches[-1:])
        return DeepFlowOutput(velocities, accelerations, [], self.log_variance(t, r))

    def average_velocity(self, x, t, r, y):
        """u(x_t, t, r, y), (N, C, H, W); x (N, C, H, W), t ≥ r in [0, 1], (N,) or numbers, y (N,). See `velocity`."""
        return self.velocity(x, (t, r), y)

    def embed_times(self, t, label):
        """As DeepFlow's, at t (N,) or (t, r), (N,) each: blocks up to `dmf_depth` see t, later ones r; no r means t."""
        t, r = (t, t) if isinstance(t, torch.Tensor) else t
        if r is t:
            return super().embed_times(t, label)
        if self.df_idxs:  # whole branches see t or r, and the gap r − t is the VeRA block's between them
            return super().embed_times([t if end <= self.dmf_depth else r for end in self.ends], label)
        conditions = [self.t_embedder(time) + label for time in (t, r)]
        return per_block(conditions, (self.dmf_depth, len(self.blocks))), []

    def log_variance(self, t, r):
        """Log-variance s of the loss at t, r (N,) → (N,), float32 under autocast too; None without the head."""
        if self.logvar_linear is None:
            return None
        features = torch.cat([sinusoid(t, LOGVAR_FREQUENCIES), sinusoid(r, LOGVAR_FREQUENCIES)], dim=1)
        return (features * self.logvar_linear.weight).sum(dim=1) + self.logvar_linear.bias

    def derivative(self, x, t, r, y, tangent):
        """u and its Jacobian-vector product along (tangent, 1, 0) in (x, t, r), without gradient, (N, C, H, W) each."""
        with torch.no_grad(), forward_mode():
            # compiled, it does not accept views of larger tensors
            return self.jvp(x.clone(), t.clone(), r, y, tangent.clone())

    def jvp(self, x, t, r, y, tangent):
        """`derivative` without its context, so that it can be compiled in one graph."""
        return torch.func.jvp(
            lambda x, t: self.average_velocity(x, t, r, y), (x, t), (tangent.to(x.dtype), torch.ones_like(t))
        )

    def compile_derivative(self):
        """Compile the derivative pass; nn.Module.compile does so for `forward` alone."""
        self.jvp = torch.compile(self.jvp, fullgraph=True)

    def supervise_branches(self, wanted):
        """Run and train the intermediate branches' velocity and acceleration layers, or neither."""
        self.deep_supervision = wanted
        if self.df_idxs:
            for layer in filter(None, (self.final_layer[0], self.final_acc_layer)):
                layer.requires_grad_(wanted)


def to_flow_map(flow_options, state, dmf_depth, add_qk_norm=False):
    """A FlowMap with the weights `state` of a flow model (arguments: `flow_options`), and its constructor arguments.

    Alignment projectors are dropped; the log-variance head is new. add_qk_norm: a QK norm, with scales 1, is new too,
    so that u(x, t, t, y) is not the flow's velocity. Raises InputError for a wrong dmf_depth.
    """
    options = {**flow_options, "ssl_align": False, "dmf_depth": dmf_depth, "use_logvar": True}
    if add_qk_norm:
        options["qk_norm"] = "rms"
    model = FlowMap(**options)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("projectors.")}
    new = ("logvar_linear.", ".q_norm.", ".k_norm.") if add_qk_norm else ("logvar_linear.",)
    fresh = {name: tensor for name, tensor in model.state_dict().items() if any(part in name for part in new)}
    model.load_state_dict({**fresh, **kept})
    return model, options

"""DeepFlow: a DiT/SiT transformer in k deeply supervised branches joined by VeRA blocks (arXiv 2503.14494).

With k = 1 branch it is exactly SiT. Time: t = 0 is data, t = 1 is noise; velocity = dx/dt.

Letters: N batch, C latent channels, H = W latent size, p patch size, T = (H/p)² tokens, D hidden size,
k branches, P width of the acceleration MLP, E alignment encoders, Z width of an encoder's features.
"""

import collections
import dataclasses
import itertools

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import InputError
from models.attention import attention
from models.layers import (
    LN_EPS,
    Block,
    LabelEmbedder,
    LayerNorm,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    VelocityLayer,
    adaln,
    merge_heads,
    modulate,
    sincos_2d,
    split_heads,
    unpatchify,
    xavier_linears_,
    zero_,
)


@dataclasses.dataclass
class DeepFlowOutput:
    """What one training forward pass returns; the final branch comes last."""

    velocities: list  # k × (N, C, H, W)
    accelerations: list  # (k − 1) × (N, C, H, W)
    projections: list  # max(k − 1, 1) · E × (N, T, Z), encoder by encoder; empty without SSL alignment


@dataclasses.dataclass
class Branch:
    """What one branch leaves behind; a* is None for the final branch, which no VeRA block follows."""

    v_star: torch.Tensor  # (N, T, D) tokens after its last block, v*
    condition: torch.Tensor  # (N, D), c_i
    a_star: torch.Tensor | None = None  # (N, T, D) acceleration feature, a*
    aligned: torch.Tensor | None = None  # (N, T, D) what is projected: VeRA's output, on which the next branch starts,
    # or of a model without VeRA the tokens after block `encoder_depth`


class TimeGapAdaLN(nn.Module):
    """Time-gap AdaLN-Zero: concat(v*, a*) modulated by the embedded gap, then an MLP back to width D.

    legacy_scaling clamps the scale to [−5, 5], as the SSL-aligned release does.
    """

    def __init__(self, hidden_size, legacy_scaling=False):
        super().__init__()
        width = 2 * hidden_size
        self.legacy_scaling = legacy_scaling
        self.norm = nn.LayerNorm(width, eps=LN_EPS, elementwise_affine=False)
        self.mlp = Mlp(width, width, hidden_size)
        self.adaLN_modulation = adaln(width, 2 * width)

    def forward(self, h, gap):
        """h (N, T, 2D), gap (N, 2D) → (N, T, D)."""
        shift, scale = self.adaLN_modulation(gap).chunk(2, dim=-1)
        if self.legacy_scaling:
            scale = scale.clamp(-5, 5)
        return self.mlp(modulate(self.norm(h), shift, scale))


class MultiheadCrossAttention(nn.Module):
    """Multi-head attention under the parameter names of nn.MultiheadAttention, always on the fused path."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query, context):
        weight_q, weight_kv = self.in_proj_weight.tensor_split([query.shape[-1]])
        bias_q, bias_kv = self.in_proj_bias.tensor_split([query.shape[-1]])
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        return self.out_proj(merge_heads(attention(q, k, v)))


class CrossSpaceAttention(nn.Module):
    """Cross-space attention: patch tokens (image space) look at the modulated feature (velocity space).

    One LayerNorm serves both; the residual is the normalised query.
    """

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.layer_norm = LayerNorm(hidden_size, eps=1e-5)
        self.multihead_attn = MultiheadCrossAttention(hidden_size, num_heads)

    def forward(self, patches, feature):
        query = self.layer_norm(patches)
        return query + self.multihead_attn(query, self.layer_norm(feature))


class VeRA(nn.Module):
    """Velocity Refiner with Acceleration, between two branches (section 3 of the paper)."""

    def __init__(self, hidden_size, num_heads, projector_dim, legacy_scaling=False):
        super().__init__()
        d, p = hidden_size, projector_dim
        self.acc_mlp = nn.Sequential(
            nn.Linear(d, p), nn.SiLU(), nn.Linear(p, 2 * p), nn.SiLU(), nn.Linear(2 * p, p), nn.SiLU(), nn.Linear(p, d)
        )
        self.acc_norm = TimeGapAdaLN(hidden_size, legacy_scaling)
        self.cross_attention = CrossSpaceAttention(hidden_size, num_heads)

    def forward(self, patches, v_star, gap):
        """patches, v* (N, T, D), embedded gap (N, 2D) → acceleration feature a* and refined tokens, (N, T, D) each."""
        a_star = self.acc_mlp(v_star)
        feature = self.acc_norm(torch.cat([v_star, a_star], dim=-1), gap)
        return a_star, self.cross_attention(patches, feature)


def check_key_layers(df_idxs, depth):
    """Raise InputError unless df_idxs are increasing 1-based blocks before the last one."""
    shown = f"--df-idxs {list(df_idxs)}"
    for index in df_idxs:
        if not 1 <= index <= depth:
            raise InputError(f"{shown}: block {index} is out of range; blocks count from 1 to {depth}")
        if index == depth:
            raise InputError(f"{shown}: block {index} is the last of {depth}; the final branch ends there by itself")
    for a, b in itertools.pairwise(df_idxs):
        if a == b:
            raise InputError(f"{shown}: block {a} is repeated; name every key layer once")
        if a > b:
            raise InputError(f"{shown}: {a} stands before {b}; list the key layers in increasing order")


class DeepFlow(nn.Module, PyTorchModelHubMixin):
    """The network. df_idxs: 1-based blocks after which a branch ends, the last block excluded; k = len(df_idxs) + 1.

    ssl_align: projectors to the widths z_dims, one per encoder, after each VeRA block; with one branch (SiT, as REPA)
    after block encoder_depth, counted from 1. Projector i·E + j belongs to VeRA block i and encoder j.
    `from_pretrained(DIR)` reads a folder that models/export.py wrote.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=24,
        num_heads=16,
        num_classes=1000,
        df_idxs=(8, 16),
        ssl_align=False,
        projector_dim=2048,
        z_dims=(768,),
        legacy_scaling=False,
        qk_norm=False,
        encoder_depth=8,
    ):
        super().__init__()
        check_key_layers(df_idxs, depth)
        check_sizes(input_size, patch_size, hidden_size, num_heads)
        if ssl_align and not df_idxs and not 1 <= encoder_depth <= depth:
            raise InputError(f"--encoder-depth {encoder_depth} is out of range; blocks count from 1 to {depth}")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.df_idxs, self.encoder_depth = tuple(df_idxs), encoder_depth
        self.gradient_checkpointing = False  # recompute the blocks in the backward pass

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.add_trunk(hidden_size, depth, num_heads, qk_norm, sincos_2d(hidden_size, input_size // patch_size))
        velocity_layers = [
            VelocityLayer(hidden_size, patch_size, in_channels) for _ in range(min(self.num_branches, 2))
        ]
        self.final_layer = velocity_layers[0]
        if self.num_branches > 1:
            self.final_layer = nn.ModuleList(velocity_layers)  # [shared by the intermediate branches, final]
            self.final_acc_layer = VelocityLayer(hidden_size, patch_size, in_channels)
            self.dt_embedder = TimestepEmbedder(2 * hidden_size)
            self.df_blocks = nn.ModuleList(
                VeRA(hidden_size, num_heads, projector_dim, legacy_scaling) for _ in self.df_idxs
            )
        if ssl_align:
            self.projectors = nn.ModuleList(
                projector(hidden_size, projector_dim, z_dim)
                for _ in self.df_idxs or (encoder_depth,)
                for z_dim in z_dims
            )
        self.initialize_weights()

    @classmethod
    def _from_pretrained(cls, *, strict=True, **kwargs):
        """The mixin's, strict unless told otherwise; what config.json says of the run is left out."""
        options = {name: value for name, value in kwargs.items() if name not in ("run", "data", "steps", "weights")}
        return super()._from_pretrained(strict=strict, **options)

    def add_trunk(self, hidden_size, depth, num_heads, qk_norm, pos_embed):
        """Make what embeds the condition, the position embedding and the blocks."""
        self.y_embedder = LabelEmbedder(self.num_classes, hidden_size)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))

    @property
    def num_branches(self):
        """k."""
        return len(self.df_idxs) + 1

    @property
    def velocity_layer(self):
        """The final branch's velocity layer."""
        return self.final_layer[1] if self.num_branches > 1 else self.final_layer

    @torch.no_grad()
    def initialize_weights(self):
        """Xavier for Linears, N(0, 0.02) for the embedders, zero for what adaLN-Zero wants to start as nothing."""
        xavier_linears_(self)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        for module in self.modules():
            if isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
            elif isinstance(module, TimestepEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)
            elif hasattr(module, "adaLN_modulation"):
                zero_(module.adaLN_modulation[1])
            if isinstance(module, VelocityLayer):
                zero_(module.linear)

    def branch_times(self, t):
        """t as (N,) for all branches, or k tensors (N,), → list of k tensors (N,)."""
        times = [t] * self.num_branches if isinstance(t, torch.Tensor) and t.ndim == 1 else list(t)
        if len(times) != self.num_branches:
            raise ValueError(f"got {len(times)} times for {self.num_branches} branches")
        return times

    def embed_times(self, times, label):
        """Conditions c_i, k × (N, D), and embedded gaps t_{i+1} − t_i, (k − 1) × (N, 2D).

        label (N, D). Times that are one tensor, as in sampling, are embedded once, and so is their gap of 0.
        """
        k = self.num_branches
        distinct = times[:1] if all(t is times[0] for t in times) else times
        conditions = [self.t_embedder(t) + label for t in distinct]
        if len(distinct) == k:
            return conditions, [self.dt_embedder(b - a) for a, b in itertools.pairwise(times)]
        return conditions * k, [self.dt_embedder(torch.zeros_like(times[0]))] * (k - 1)

    def run_branches(self, x, times, y):
        """Run the trunk and yield a Branch after each branch; x (N, C, H, W), times k × (N,), y (N,)."""
        patches = tokens = self.x_embedder(x) + self.pos_embed
        label, text = self.embed_condition(y)
        conditions, gaps = self.embed_times(times, label)
        ends = (0, *self.df_idxs, len(self.blocks))
        for i in range(self.num_branches):
            aligned = None
            for number, block in enumerate(self.blocks[ends[i] : ends[i + 1]], ends[i] + 1):
                c = self.block_condition(conditions, i, number)
                tokens, text = self.run_block(block, tokens, text, c)
                if number == self.encoder_depth and self.num_branches == 1:
                    aligned = tokens
            branch = Branch(v_star=tokens, condition=c, aligned=aligned)
            if i < self.num_branches - 1:
                branch.a_star, branch.aligned = self.df_blocks[i](patches, tokens, gaps[i])
                tokens = branch.aligned
            yield branch

    def block_condition(self, conditions, branch, number):
        """Condition (N, D) of block `number`, counted from 1, in a branch, counted from 0."""
        return conditions[branch]

    def embed_condition(self, y):
        """Condition y → what is added to the embedded time, (N, D), and text tokens, which only text-to-image has."""
        return self.y_embedder(y), None

    def run_block(self, block, tokens, text, c):
        """One block on image tokens (N, T, D) and text tokens; returns both."""
        return self.call(block, tokens, c), text

    def call(self, block, *inputs):
        """block(*inputs), whose activations are recomputed later where memory is to be saved."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, x, t, y):
        """Velocities, accelerations and projections of all branches.

        x (N, C, H, W); t (N,) or k tensors (N,) in [0, 1]; y (N,) labels, num_classes is the null class.
        Returns DeepFlowOutput. Draws nothing random.
        """
        *intermediate, final = self.run_branches(x, self.branch_times(t), y)
        out = DeepFlowOutput([], [], [])
        for branch in intermediate:
            self.add_supervised(out, branch)
        out.velocities.append(self.to_image(self.velocity_layer(final.v_star, final.condition)))
        if hasattr(self, "projectors"):
            aligned = [branch.aligned for branch in intermediate or [final]]
            per_block = len(self.projectors) // len(aligned)
            out.projections = [project(aligned[i // per_block]) for i, project in enumerate(self.projectors)]
        return out

    def add_supervised(self, out, branch):
        """Append the velocity and the acceleration of an intermediate branch to `out`."""
        shared_layer = self.final_layer[0]
        out.velocities.append(self.to_image(shared_layer(branch.v_star, branch.condition)))
        out.accelerations.append(self.to_image(self.final_acc_layer(branch.a_star, branch.condition)))

    def velocity(self, x, t, y):
        """Final velocity only, x (N, C, H, W), t (N,), y (N,) → (N, C, H, W); no intermediate layer is run."""
        return self.final_velocity(x, self.branch_times(t), y)

    def final_velocity(self, x, times, y):
        """The last branch's velocity at the times that `run_branches` takes."""
        branches = self.run_branches(x, times, y)
        (final,) = collections.deque(branches, maxlen=1)  # the others' memory goes as they do
        return self.to_image(self.velocity_layer(final.v_star, final.condition))

    def to_image(self, tokens):
        """Token vectors (N, T, p·p·C) → (N, C, H, W)."""
        return unpatchify(tokens, self.patch_size, self.in_channels)


def projector(hidden_size, projector_dim, z_dim):
    """MLP from refined tokens to the alignment encoder's width."""
    d, p = hidden_size, projector_dim
    return nn.Sequential(nn.Linear(d, p), nn.SiLU(), nn.Linear(p, p), nn.SiLU(), nn.Linear(p, z_dim))


def check_sizes(input_size, patch_size, hidden_size, num_heads):
    """Raise InputError when patches do not tile the latent or heads do not divide the width."""
    if input_size % patch_size:
        raise InputError(
            f"latents of size {input_size} are not divisible into patches of {patch_size}; choose another --model"
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise InputError(f"hidden size {hidden_size} must be divisible by 4 and by the number of heads ({num_heads})")

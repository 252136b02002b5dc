"""DeepFlow: a DiT/SiT transformer in k deeply supervised branches joined by VeRA blocks (arXiv 2503.14494).

With k = 1 branch it is exactly SiT. Time: t = 0 is data, t = 1 is noise; velocity = dx/dt.

Letters: N batch, C latent channels, H = W latent size, p patch size, T = (H/p)² tokens, D hidden size, k branches,
P width of the acceleration MLP, W width of the embedded gap, E alignment encoders, Z width of an encoder's features.
"""

import dataclasses
import itertools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import InputError
from models.hub import HubModel
from models.layers import (
    LN_EPS,
    Block,
    LabelEmbedder,
    LayerNorm,
    Mlp,
    MultiheadCrossAttention,
    PatchEmbed,
    TimestepEmbedder,
    VelocityLayer,
    adaln,
    modulate,
    silu_mlp,
    sincos_2d,
    spread,
    zero_,
)

# Table 7a, as we read it. Branch i + 1 starts from v*; from equation 8 on v* alone; + equation 6; + equation 9.
VERA_STEPS = ("none", "gap", "acceleration", "full")
WITH_ACCELERATION = ("acceleration", "full")


@dataclasses.dataclass
class DeepFlowOutput:
    """What one training forward pass returns; the final branch comes last."""

    velocities: list  # k × (N, C, H, W); for a flow map u is last, and the only one without deep supervision
    accelerations: list  # (k − 1) × (N, C, H, W); empty in the steps of Table 7a without acceleration
    projections: list  # max(k − 1, 1) · E × (N, T, Z), encoder by encoder; empty without SSL alignment
    log_variance: torch.Tensor | None = None  # (N,) float32, only for flow maps


@dataclasses.dataclass
class Branch:
    """What one branch leaves behind."""

    v_star: torch.Tensor  # (N, T, D) tokens after its last block: the velocity feature v*
    condition: torch.Tensor  # (N, D) of its last block
    is_final: bool = False  # the last of the k branches
    a_star: torch.Tensor | None = None  # (N, T, D) acceleration feature a*; None for the final branch
    # (N, T, D) What projectors see: VeRA's refined tokens; with one branch the tokens after block `encoder_depth`.
    aligned: torch.Tensor | None = None


class TimeGapAdaLN(nn.Module):
    """Time-gap conditioning (equation 8): AdaLN-Zero of concat(v*, a*) by the embedded gap, then an MLP to width D.

    width W: 2D, or D without a*. legacy_scaling clamps the scale to [−5, 5], as the SSL-aligned release does.
    """

    def __init__(self, width, hidden_size, legacy_scaling=False):
        super().__init__()
        self.legacy_scaling = legacy_scaling
        self.norm = nn.LayerNorm(width, eps=LN_EPS, elementwise_affine=False)
        self.mlp = Mlp(width, width, hidden_size)
        self.adaLN_modulation = adaln(width, 2 * width)

    def forward(self, h, gap):
        """h (N, T, W), embedded gap (N, W) → (N, T, D)."""
        shift, scale = self.adaLN_modulation(gap).chunk(2, dim=-1)  # (N, W) each
        if self.legacy_scaling:
            scale = scale.clamp(-5, 5)
        return self.mlp(modulate(self.norm(h), shift, scale))


class CrossSpaceAttention(nn.Module):
    """Cross-space attention (equation 9): patch tokens, in image space, query the feature of equation 8, in velocity
    space. As in the release, one LayerNorm serves both, and the residual is the normalised query.
    """

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.layer_norm = LayerNorm(hidden_size, eps=1e-5)
        self.multihead_attn = MultiheadCrossAttention(hidden_size, num_heads)

    def forward(self, patches, feature):
        """patches and feature (N, T, D) → (N, T, D)."""
        query = self.layer_norm(patches)
        return query + self.multihead_attn(query, self.layer_norm(feature))


class VeRA(nn.Module):
    """Velocity Refiner with Acceleration, which leads from one branch to the next (section 3 of the paper).

    step: how much of it there is, as we read Table 7a, one of VERA_STEPS; acc_mlp: hidden widths of ACC_MLP.
    """

    def __init__(self, hidden_size, num_heads, acc_mlp, legacy_scaling=False, step="full"):
        super().__init__()
        self.acc_mlp = self.acc_norm = self.cross_attention = None
        if step in WITH_ACCELERATION:
            self.acc_mlp = silu_mlp(hidden_size, *acc_mlp, hidden_size)
        if step != "none":
            self.acc_norm = TimeGapAdaLN(gap_width(hidden_size, step), hidden_size, legacy_scaling)
        if step == "full":
            self.cross_attention = CrossSpaceAttention(hidden_size, num_heads)

    def forward(self, patches, v_star, gap):
        """patches, v* (N, T, D), embedded gap (N, W) → acceleration feature a* and refined tokens, (N, T, D) each.

        a* is None in steps without acceleration; gap is None in the step "none", in which v* is left as it is.
        """
        a_star, feature = None, v_star
        if self.acc_mlp is not None:
            a_star = self.acc_mlp(v_star)  # equation 6
            feature = torch.cat([v_star, a_star], dim=-1)  # (N, T, 2D)
        if self.acc_norm is not None:
            feature = self.acc_norm(feature, gap)  # equation 8
        if self.cross_attention is not None:
            # The network's own patches query, not the tokens: v* reaches the next branch as keys and values only.
            feature = self.cross_attention(patches, feature)  # equation 9
        return a_star, feature


class DeepFlow(nn.Module, HubModel):
    """The network. df_idxs: 1-based blocks after which a branch ends, the last block excluded; k = len(df_idxs) + 1.

    ssl_align adds projectors to the widths z_dims, one per encoder, after each VeRA block; with one branch (SiT, as in
    REPA) after block encoder_depth, counted from 1. Projector i·E + j belongs to VeRA block i and encoder j.
    vera: the step of Table 7a, one of VERA_STEPS; acc_mlp: hidden widths of ACC_MLP, by default P, 2P, P.
    `from_pretrained(DIR)` reads a folder that models/export.py wrote.
    """

    kind = "flow"  # FlowMap is a "flow map", MMDiT is "text"

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
        vera="full",
        acc_mlp=None,
    ):
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, num_heads)
        check_branches(df_idxs, depth, vera, acc_mlp)
        if ssl_align and not df_idxs and not 1 <= encoder_depth <= depth:
            raise InputError(f"--encoder-depth {encoder_depth} is out of range; blocks count from 1 to {depth}")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.df_idxs, self.encoder_depth = tuple(df_idxs), encoder_depth
        self.gradient_checkpointing = False  # recompute the blocks in the backward pass

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.add_trunk(hidden_size, depth, num_heads, qk_norm, sincos_2d(hidden_size, input_size // patch_size))
        sizes = (hidden_size, patch_size, in_channels)
        self.final_layer, self.final_acc_layer, self.dt_embedder = VelocityLayer(*sizes), None, None
        if self.df_idxs:  # one velocity layer for all intermediate branches, one for the final
            self.final_layer = nn.ModuleList([self.final_layer, VelocityLayer(*sizes)])
            self.final_acc_layer = VelocityLayer(*sizes) if vera in WITH_ACCELERATION else None
            self.dt_embedder = TimestepEmbedder(gap_width(hidden_size, vera)) if vera != "none" else None
        widths = acc_widths(acc_mlp, projector_dim)
        self.df_blocks = nn.ModuleList(VeRA(hidden_size, num_heads, widths, legacy_scaling, vera) for _ in self.df_idxs)
        aligned_places = (len(self.df_idxs) or 1) if ssl_align else 0
        self.projectors = nn.ModuleList(
            silu_mlp(hidden_size, projector_dim, projector_dim, z_dim)  # from refined tokens to an encoder's width
            for _ in range(aligned_places)
            for z_dim in z_dims
        )
        self.initialize_weights()

    def add_trunk(self, hidden_size, depth, num_heads, qk_norm, pos_embed):
        """Make the label table, the position embedding and the blocks; MMDiT makes its own."""
        self.y_embedder = LabelEmbedder(self.num_classes, hidden_size)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))

    @torch.no_grad()
    def initialize_weights(self):
        """Xavier for Linears, N(0, 0.02) for the embedders, zero for adaLN-Zero and the velocity layers."""
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for layer in [*linears, self.x_embedder.proj]:
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(layer.bias)
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

    @property
    def num_branches(self):
        """k."""
        return len(self.df_idxs) + 1

    @property
    def ends(self):
        """The blocks, counted from 1, after which the k branches end."""
        return *self.df_idxs, len(self.blocks)

    def forward(self, x, t, y):
        """Velocities, accelerations and projections of all branches, as DeepFlowOutput. Draws nothing random.

        x (N, C, H, W); t (N,) or k tensors (N,) in [0, 1]; y (N,) labels, num_classes is the null class.
        """
        branches = list(self.run_branches(x, t, y))
        velocities, accelerations = self.outputs(branches)
        aligned = [branch.aligned for branch in branches[:-1] or branches]
        per_place = len(self.projectors) // len(aligned)  # E
        projections = [project(aligned[i // per_place]) for i, project in enumerate(self.projectors)]
        return DeepFlowOutput(velocities, accelerations, projections)

    def velocity(self, x, t, y, branch=None):
        """Velocity, (N, C, H, W), of one branch, counted from 1; by default the last. See `velocities`."""
        return self.velocities(x, t, y, [self.num_branches if branch is None else branch])[0]

    def velocities(self, x, t, y, branches=None):
        """Velocities, (N, C, H, W) each, of all branches or of those numbered in `branches`, in order; one pass.

        x (N, C, H, W); t (N,) or a number, or k of them, one per branch; y (N,) or a number. A branch whose t has fewer
        rows runs only the first rows, and so do those after it. Nothing is run beyond the last branch requested. Raises
        InputError for branches or labels out of range; labels on a GPU, which cause a wait, only if t are numbers.
        """
        y = torch.full((len(x),), y, device=x.device) if isinstance(y, int) else y
        numbers = range(1, self.num_branches + 1)
        if wrong := [branch for branch in branches or () if branch not in numbers]:
            raise InputError(f"branch {wrong[0]} is out of range; this model's count from 1 to {numbers[-1]}")
        branches = branches or numbers
        run = itertools.islice(self.run_branches(x, spread(t, x, y, self.num_classes), y), max(branches))
        return [self.velocity_of(branch) for number, branch in enumerate(run, 1) if number in branches]

    def run_branches(self, x, t, y):
        """Run the blocks and yield a Branch wherever one ends; arguments as those of `velocities`.

        VeRA runs when the next Branch is requested, and completes the previous one only then.
        """
        patches = tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        conditions, gaps, text = self.embed(t, y)  # one condition (N, D) per block, one gap (N, W) per VeRA block
        vera, gaps, aligned = iter(self.df_blocks), iter(gaps), None
        for number, (block, c) in enumerate(zip(self.blocks, conditions, strict=True), 1):
            tokens, text = self.run(block, tokens, text, c)  # (N, T, D)
            if number in self.df_idxs:  # a branch ends: VeRA leads to the next
                yield (branch := Branch(tokens, c))
                if (rows := len(conditions[number])) < len(tokens):  # the others end here
                    patches, tokens, text = (part if part is None else part[:rows] for part in (patches, tokens, text))
                branch.a_star, tokens = next(vera)(patches, tokens, next(gaps))  # equations 6, 8, 9
                branch.aligned = tokens
            elif number == self.encoder_depth and not self.df_idxs:  # where REPA aligns a model of one branch
                aligned = tokens
        yield Branch(tokens, c, is_final=True, aligned=aligned)

    def run(self, block, tokens, text, c):
        """block(tokens, text, c); with gradient checkpointing the backward pass recomputes its activations."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, text, c, use_reentrant=False)
        return block(tokens, text, c)

    def embed(self, t, y):
        """What drives the blocks: the conditions and gaps of `embed_times`, and text tokens, which only MMDiT has."""
        return *self.embed_times(t, self.y_embedder(y)), None

    def embed_times(self, t, label):
        """One condition c = embedded time + label, (N, D), per block; one embedded gap, (N, W), per VeRA block.

        t (N,), one time for all branches (equation 4), or k tensors (N,), one per branch (equation 5); label (N, D).
        """
        if isinstance(t, torch.Tensor) and t.ndim == 1:  # as in sampling: embedded once, and so is the gap of 0
            conditions = [self.t_embedder(t) + label] * self.num_branches
            gaps = [self.embed_gap(torch.zeros_like(t))] * len(self.df_idxs)
        else:
            conditions = [self.t_embedder(time) + label[: len(time)] for time in t]
            gaps = [self.embed_gap(after - before[: len(after)]) for before, after in itertools.pairwise(t)]
        return per_block(conditions, self.ends), gaps

    def embed_gap(self, gap):
        """A signed gap between times (N,) → (N, W); None without gaps."""
        return None if self.dt_embedder is None else self.dt_embedder(gap)

    def outputs(self, branches):
        """Velocities of the branches and accelerations of the intermediate ones: two lists of (N, C, H, W)."""
        velocities = [self.velocity_of(branch) for branch in branches]
        pairs = [(branch.a_star, branch.condition) for branch in branches if branch.a_star is not None]
        return velocities, [self.final_acc_layer(*pair) for pair in pairs]

    def velocity_of(self, branch):
        """Velocity (N, C, H, W) of a Branch."""
        layer = self.final_layer[1 if branch.is_final else 0] if self.df_idxs else self.final_layer
        return layer(branch.v_star, branch.condition)


def per_block(values, ends):
    """values[i] for each block after ends[i − 1] up to ends[i]: ("a", "b"), (2, 3) → ["a", "a", "b"]."""
    lengths = (end - start for start, end in itertools.pairwise((0, *ends)))
    return [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]


def acc_widths(acc_mlp, projector_dim):
    """Hidden widths of ACC_MLP: as given, else P, 2P, P."""
    return tuple(acc_mlp or (projector_dim, 2 * projector_dim, projector_dim))


def gap_width(hidden_size, step):
    """W, the width of what the time gap modulates: that of concat(v*, a*), or of v* alone."""
    return 2 * hidden_size if step in WITH_ACCELERATION else hidden_size


def check_sizes(input_size, patch_size, hidden_size, num_heads):
    """Raise InputError when patches do not tile the latent or heads do not divide the width."""
    if input_size % patch_size:
        raise InputError(f"latents of size {input_size} do not divide into patches of {patch_size}; change --model")
    if hidden_size % num_heads or hidden_size % 4:
        raise InputError(f"hidden size {hidden_size} must be divisible by 4 and by the number of heads ({num_heads})")


def check_branches(df_idxs, depth, step, acc_mlp):
    """Raise InputError unless df_idxs are increasing blocks before the last, and VeRA's options make sense for them."""
    if any(before >= after for before, after in itertools.pairwise((0, *df_idxs, depth))):
        raise InputError(f"--df-idxs {list(df_idxs)} are not increasing block numbers from 1 to {depth - 1}")
    if step not in VERA_STEPS:
        raise InputError(f"--vera {step} is unknown; choose one of {', '.join(VERA_STEPS)}")
    if not df_idxs and (step != "full" or acc_mlp):
        raise InputError("--vera and --acc-mlp need a model with key layers, such as --model DeepFlow-B/2")
    if acc_mlp and (step not in WITH_ACCELERATION or min(acc_mlp) < 1):
        raise InputError(f"--acc-mlp {list(acc_mlp)} must be widths from 1, with --vera acceleration or full")

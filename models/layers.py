"""Layers shared by the transformers: embeddings, attention, the adaLN-Zero block and the velocity layer.

Letters: N batch, C latent channels, H = W latent size, p patch size, T = (H/p)² tokens, D hidden size.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from common.errors import InputError
from models.attention import attention, differentiating

LN_EPS = 1e-6


class DrawsNothing(TorchFunctionMode):
    """Skips nn.init.normal_ for networks on the meta device, which have no values: torch would import its compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.init.normal_:
            return (*args, *kwargs.values())[0]
        return func(*args, **(kwargs or {}))


def modulate(h, shift, scale):
    """adaLN modulation h·(1 + scale) + shift; h (N, T, D), shift and scale (N, D)."""
    return torch.addcmul(shift.unsqueeze(1), h, 1 + scale.unsqueeze(1))  # one pass over h


def sincos_2d(width, grid):
    """Fixed position embedding of a grid × grid token square, row-major → float32 (1, grid², width).

    [sin(p·ω), cos(p·ω)], ω_j = 10000^(−4j/width), of the column p in the first half of the channels, of the row in the
    second.
    """
    with torch.device("cpu"):  # on the meta device, arange would import torch's compiler, for seconds
        omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    x, y = (position.flatten()[:, None] * omega for position in (column, row))  # (T, width/4) each
    embedding = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float().unsqueeze(0)
    return embedding.to(torch.empty(0).device)


class PatchEmbed(nn.Module):
    """p × p convolution with stride p: (N, C, H, W) → tokens (N, T, D), row-major.

    Computed as a matrix product of patches, the tokens are contiguous; a convolution's output would be transposed.
    """

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        p = self.proj.kernel_size[0]
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (N, H/p, W/p, C, p, p)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def frequencies(count, device=None):
    """The `count` frequencies of `sinusoid`, float32."""
    return torch.exp(-math.log(10000.0) * torch.arange(count, device=device, dtype=torch.float32) / count)


def sinusoid(t, count):
    """[cos(t·f), sin(t·f)] at `count` frequencies f: (N,) → (N, 2·count), at least in float32."""
    angles = t[:, None] * frequencies(count, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 entries, then Linear, SiLU, Linear: (N,) → (N, D).

    t is used as it is, without the factor 1000 of diffusion models; signed gaps are embedded the same way.
    """

    NUM_FREQUENCIES = 128

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        return self.mlp(sinusoid(t, self.NUM_FREQUENCIES).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Table of num_classes + 1 rows; the last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        try:
            return self.embedding_table(y)
        except IndexError:  # raised only on a CPU: no synchronisation with a GPU
            check_labels(y, self.embedding_table.num_embeddings - 1)
            raise


def check_labels(y, num_classes):
    """Raise InputError for labels y (N,) out of range; synchronises with their device."""
    if len(wrong := y[(y < 0) | (y > num_classes)]):
        classes = f"a class from 0 to {num_classes - 1}, nor {num_classes}, the null class"
        raise InputError(f"label {wrong[0].item()} is not {classes}; correct y")


def spread(t, x, y, num_classes):
    """A number t as the time (N,) of x (N, …), after checking labels y (N,); tensors (N,) are returned as they are.

    A list's members are treated alike. num_classes: None if y is text. Raises InputError.
    """
    if isinstance(t, list | tuple):
        return [spread(time, x, y, num_classes) for time in t]
    if getattr(t, "ndim", 0):
        return t
    if num_classes is not None:
        check_labels(y, num_classes)
    return torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device).expand(len(x))


class LayerNorm(nn.LayerNorm):
    """LayerNorm with affine; a derivative pass scales and shifts outside the kernel, or it would not compile."""

    def forward(self, h):
        if not differentiating():
            return super().forward(h)
        return F.layer_norm(h, self.normalized_shape, eps=self.eps) * self.weight + self.bias


class RMSNorm(nn.Module):
    """h / rms(h) with a learned scale, at least in float32; the published flow maps' QK norm."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h):
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps) * self.scale).to(h.dtype)


def qk_norm_layer(kind, head_dim):
    """Norm of each head's q or k: False none, True LayerNorm (DeepFlow's), "rms" RMSNorm (Decoupled MeanFlow's)."""
    if not kind:
        return nn.Identity()
    return RMSNorm(head_dim) if kind == "rms" else LayerNorm(head_dim, eps=1e-5)


class Attention(nn.Module):
    """Multi-head self-attention with qkv bias; qk_norm as `qk_norm_layer` takes it."""

    def __init__(self, hidden_size, num_heads, qk_norm=False):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = qk_norm_layer(qk_norm, head_dim), qk_norm_layer(qk_norm, head_dim)

    def heads(self, h):
        """h (N, T, D) → queries, keys and values (N, heads, T, D/heads), normalised where so asked."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(h).chunk(3, dim=-1))
        return self.q_norm(q), self.k_norm(k), v


class MultiheadCrossAttention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention, which bypasses the fused kernels."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query, context):
        """query and context (N, T, D) → (N, T, D)."""
        weight_q, weight_kv = self.in_proj_weight.tensor_split([query.shape[-1]])
        bias_q, bias_kv = self.in_proj_bias.tensor_split([query.shape[-1]])
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))  # (N, heads, T, D/heads) each
        return self.out_proj(merge_heads(attention(q, k, v)))


def split_heads(h, num_heads):
    """(N, T, D) → (N, heads, T, D/heads)."""
    return h.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(h):
    """(N, heads, T, D/heads) → (N, T, D)."""
    return h.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, in_features, hidden_features, out_features):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def adaln(condition_size, out_features):
    """SiLU → Linear, the source of shifts, scales and gates. Zero at initialisation."""
    return nn.Sequential(nn.SiLU(), nn.Linear(condition_size, out_features))


class Block(nn.Module):
    """DiT block with adaLN-Zero: gated attention, then a gated MLP."""

    def __init__(self, hidden_size, num_heads, qk_norm=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=LN_EPS, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, eps=LN_EPS, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, hidden_size)
        self.adaLN_modulation = adaln(hidden_size, 6 * hidden_size)

    def before(self, h, c):
        """Queries, keys and values for the attention, and the rest of the modulation for `after`."""
        shift, scale, *rest = self.adaLN_modulation(c).split(h.shape[-1], dim=-1)
        return self.attn.heads(modulate(self.norm1(h), shift, scale)), rest

    def after(self, h, attended, rest):
        """Gated residuals of the attention's result (N, heads, T, D/heads) and of the MLP."""
        gate_a, shift, scale, gate_m = rest
        h = torch.addcmul(h, gate_a.unsqueeze(1), self.attn.proj(merge_heads(attended)))
        return torch.addcmul(h, gate_m.unsqueeze(1), self.mlp(modulate(self.norm2(h), shift, scale)))

    def forward(self, tokens, text, c):
        """tokens (N, T, D), c (N, D) → tokens, and text as it came: only MMDiT's blocks have some."""
        heads, rest = self.before(tokens, c)
        return self.after(tokens, attention(*heads), rest), text


class VelocityLayer(nn.Module):
    """LayerNorm, modulation by c, Linear: h (N, T, D), c (N, D) → (N, C, H, W)."""

    def __init__(self, hidden_size, patch_size, channels):
        super().__init__()
        self.patch_size, self.channels = patch_size, channels
        self.norm_final = nn.LayerNorm(hidden_size, eps=LN_EPS, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = adaln(hidden_size, 2 * hidden_size)

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        patches = self.linear(modulate(self.norm_final(h), shift, scale))  # (N, T, p·p·C)
        n, grid, p = len(h), math.isqrt(h.shape[1]), self.patch_size
        x = patches.reshape(n, grid, grid, p, p, self.channels)  # by row and column in the patch, then channel
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, self.channels, grid * p, grid * p)


def silu_mlp(*widths):
    """Linear layers from each width to the next, with SiLU between them."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def zero_(linear):
    """Set a Linear's weight and bias to zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)

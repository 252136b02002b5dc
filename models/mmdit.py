"""MMDiT: text and image tokens in one attention, weights of their own; with branches it is text-to-image DeepFlow.

With k = 1 branch it is REPA's text-to-image model. Branches, velocity and acceleration layers and VeRA are DeepFlow's,
on the image tokens alone; text passes from branch to branch unchanged.

Letters: N batch, T image tokens, L text tokens, D hidden size, W width of the text features.
"""

import torch
from torch import nn

from common.errors import InputError
from models.attention import attention
from models.deepflow import DeepFlow, TimeGapAdaLN
from models.layers import LN_EPS, Attention, Block, adaln, modulate, zero_

TEXT_TOKENS = 77  # L of CLIP's text features
INITIALISATIONS = ("dit", "repa")


class LastTextBlock(nn.Module):
    """The text stream of the last block: the image still looks at it, and there it ends."""

    def __init__(self, hidden_size, num_heads, qk_norm=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=LN_EPS, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        del self.attn.proj
        self.adaLN_modulation = adaln(hidden_size, 2 * hidden_size)

    def before(self, h, c):
        """As Block.before; nothing is left for `after`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.attn.heads(modulate(self.norm1(h), shift, scale)), None

    def after(self, _h, _attended, _rest):
        """Nothing."""
        return None


class JointBlock(nn.Module):
    """Two DiT blocks, of text and of image, whose tokens share one attention; everything else is each stream's own."""

    def __init__(self, hidden_size, num_heads, qk_norm=False, is_last=False):
        super().__init__()
        self.context_block = (LastTextBlock if is_last else Block)(hidden_size, num_heads, qk_norm)
        self.x_block = Block(hidden_size, num_heads, qk_norm)

    def forward(self, tokens, text, c):
        """tokens (N, T, D), text (N, L, D), c (N, D) → both, text None after the last block."""
        of_text, rest_of_text = self.context_block.before(text, c)
        of_image, rest_of_image = self.x_block.before(tokens, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_text, of_image, strict=True))
        attended = attention(q, k, v)
        text_part, image_part = attended.split([text.shape[1], tokens.shape[1]], dim=2)
        tokens = self.x_block.after(tokens, image_part, rest_of_image)
        return tokens, self.context_block.after(text, text_part, rest_of_text)


class MMDiT(DeepFlow):
    """The network. context_dim: W; init: "repa" keeps PyTorch's defaults, "dit" is DeepFlow's initialisation.

    The condition y is text features (N, L, W); times, branches and outputs are those of DeepFlow.
    """

    def __init__(self, *args, context_dim=768, init="dit", **options):
        if init not in INITIALISATIONS:
            raise InputError(f"--init {init!r} is unknown; choose one of {', '.join(INITIALISATIONS)}")
        self.context_dim, self.init = context_dim, init
        super().__init__(*args, num_classes=None, **options)

    def add_trunk(self, hidden_size, depth, num_heads, qk_norm, pos_embed):
        """Make what embeds the text, the position embedding and the blocks."""
        self.context_embedder = nn.Linear(self.context_dim, hidden_size)
        self.register_buffer("pos_embed", pos_embed)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, qk_norm, is_last=number == depth) for number in range(1, depth + 1)
        )

    @property
    def blocks(self):
        """The blocks, under the name that the branches know."""
        return self.joint_blocks

    def initialize_weights(self):
        """DeepFlow's, or only what VeRA's adaLN-Zero needs."""
        if self.init == "dit":
            return super().initialize_weights()
        for module in self.modules():
            if isinstance(module, TimeGapAdaLN):
                zero_(module.adaLN_modulation[1])
        return None

    def embed_condition(self, y):
        """Text features y (N, L, W) → nothing to add to the embedded time (no pooled text), text tokens (N, L, D)."""
        return 0, self.context_embedder(y)

    def run_block(self, block, tokens, text, c):
        """One joint block on both streams."""
        return self.call(block, tokens, text, c)

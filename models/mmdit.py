"""MMDiT: text and image tokens share one attention and nothing else; with branches it is text-to-image DeepFlow.

With k = 1 branch it is REPA's text-to-image model. Branches, velocity and acceleration layers and VeRA are DeepFlow's
and see the image tokens only; VeRA leaves the text tokens unchanged.

Letters: N batch, T image tokens, L text tokens, D hidden size, W width of the text features.
"""

import torch
from torch import nn

from common.errors import InputError
from models.attention import attention
from models.deepflow import DeepFlow
from models.layers import LN_EPS, Attention, Block, adaln, zero_

TEXT_TOKENS = 77  # L of CLIP's text features
INITIALISATIONS = ("dit", "repa")


class LastTextBlock(nn.Module):
    """The text stream of the last block: image tokens still attend to it, but it is not updated."""

    def __init__(self, hidden_size, num_heads, qk_norm=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=LN_EPS, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        del self.attn.proj
        self.adaLN_modulation = adaln(hidden_size, 2 * hidden_size)

    before = Block.before  # with no modulation left for `after`

    def after(self, _h, _attended, _rest):
        """The text ends here."""
        return None


class JointBlock(nn.Module):
    """A DiT block for text and one for the image, joined by one attention over both streams' tokens."""

    def __init__(self, hidden_size, num_heads, qk_norm=False, is_last=False):
        super().__init__()
        self.context_block = (LastTextBlock if is_last else Block)(hidden_size, num_heads, qk_norm)
        self.x_block = Block(hidden_size, num_heads, qk_norm)

    def forward(self, tokens, text, c):
        """tokens (N, T, D), text (N, L, D), c (N, D) → both, text None after the last block."""
        of_text, rest_of_text = self.context_block.before(text, c)
        of_image, rest_of_image = self.x_block.before(tokens, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_text, of_image, strict=True))
        text_part, image_part = attention(q, k, v).split([text.shape[1], tokens.shape[1]], dim=2)
        tokens = self.x_block.after(tokens, image_part, rest_of_image)
        return tokens, self.context_block.after(text, text_part, rest_of_text)


class MMDiT(DeepFlow):
    """The network. context_dim: W; init: "repa" keeps PyTorch's defaults, "dit" is DeepFlow's initialisation.

    The condition y is text features (N, L, W); times, branches and outputs are DeepFlow's.
    """

    kind = "text"

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
        """The joint blocks, under the name that DeepFlow's forward pass uses."""
        return self.joint_blocks

    def initialize_weights(self):
        """DeepFlow's with init "dit"; with "repa" only VeRA's adaLN-Zero is set to zero."""
        if self.init == "dit":
            super().initialize_weights()
            return
        for vera in self.df_blocks:
            if vera.acc_norm is not None:
                zero_(vera.acc_norm.adaLN_modulation[1])

    def embed(self, t, y):
        """As DeepFlow's, for text features y (N, L, W) → text tokens (N, L, D); no label joins the conditions."""
        text = self.context_embedder(y)
        return *self.embed_times(t, text.new_zeros(len(text), 1)), text

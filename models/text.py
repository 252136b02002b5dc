"""The text encoder of text-to-image: captions → CLIP's features of each token. transformers is imported only here.

Letters: N captions, L tokens (a caption is padded or cut to L), W width of the features.
"""

import dataclasses
import re
from pathlib import Path

import torch

from common.errors import InputError, first_line, note, system_fault
from common.records import Count

DEFAULT_TEXT_ENCODER = "openai/clip-vit-large-patch14"


def encoder_family(name):
    """Identity of a text encoder: the last part of its name or folder, in a hub cache of the name on the hub."""
    parts = Path(str(name)).parts
    cached = [part for part in parts if re.fullmatch(r"models--.+--.+", part)]
    return cached[-1].split("--")[-1] if cached else Path(str(name)).name


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """What a set of text features was made with; travels in the data manifest and in the checkpoint."""

    encoder: str = DEFAULT_TEXT_ENCODER
    family: str = encoder_family(DEFAULT_TEXT_ENCODER)
    tokens: Count = 77
    width: Count = 768

    def check_same(self, other, ours, theirs):
        """Raise InputError unless `other` has the same encoder, tokens and width; ours, theirs: for the message."""
        for field in ("family", "tokens", "width"):
            a, b = getattr(self, field), getattr(other, field)
            if a != b:
                both = f"{ours} has {field} {a} ({self.encoder}), {theirs} has {field} {b} ({other.encoder})"
                remedy = f"use --text-encoder {self.encoder}, or encode the captions again"
                raise InputError(f"text encoder mismatch: {both}; {remedy}")


def import_transformers(flag):
    """The package, or an InputError that names the flag that needs it."""
    try:
        import transformers  # takes seconds, and training and sampling of classes never need it
    except ImportError:
        raise InputError(f"{flag} needs a package: pip install transformers") from None
    return transformers


class Tokens:
    """Captions → token ids padded to L; a longer caption is cut, with one warning."""

    def __init__(self, tokenizer, length):
        self.tokenizer, self.length, self.has_warned = tokenizer, length, False

    def __call__(self, captions):
        """List of N captions → int64 (N, L)."""
        captions = list(captions)
        if not self.has_warned:
            ids = self.tokenizer(captions, verbose=False)["input_ids"]
            length, longest = max((len(row), caption) for row, caption in zip(ids, captions, strict=True))
            if length > self.length:
                self.has_warned = True
                note(f"warning: '{longest[:60]}…' has {length} tokens; long captions are cut to {self.length}")
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokenizer(captions, **options)["input_ids"]


def load_clip(kind, name, device, flag):
    """(tokenizer, model of transformers' class `kind`) by hub name or folder, float32. Raises InputError."""
    transformers = import_transformers(flag)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(name))
        model = getattr(transformers, kind).from_pretrained(str(name))
    except Exception as error:  # the tokenizers library raises plain ones for a damaged file
        remedy = f"pass {flag} with the folder of a CLIP model and its tokenizer, or connect to the hub once"
        fault = system_fault(error, name) or f"cannot load '{name}' ({first_line(error)}); {remedy}"
        raise InputError(fault) from None
    return tokenizer, model.float().eval().requires_grad_(False).to(device)


class TextEncoder:
    """A CLIP text model with its tokenizer and spec, by hub name or folder. Raises InputError if loading fails."""

    def __init__(self, name=DEFAULT_TEXT_ENCODER, device="cpu"):
        tokenizer, self.model = load_clip("CLIPTextModel", name, device, "--text-encoder")
        config = self.model.config
        self.spec = TextSpec(str(name), encoder_family(name), config.max_position_embeddings, config.hidden_size)
        self.tokens = Tokens(tokenizer, self.spec.tokens)

    @torch.no_grad()
    def __call__(self, captions):
        """List of N captions → float32 (N, L, W): the last hidden state, padded to L tokens, without a mask."""
        ids = self.tokens(captions).to(self.model.device, non_blocking=True)
        return self.model(input_ids=ids).last_hidden_state.float()

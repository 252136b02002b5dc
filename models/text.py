"""The text encoder of text-to-image: captions → CLIP's features of every token. Only here is transformers imported.

Letters: N captions, L tokens that each is padded or cut to, W width of the features.
"""

import dataclasses
import re
from pathlib import Path

import torch

from models.errors import InputError, note

DEFAULT_TEXT_ENCODER = "openai/clip-vit-large-patch14"


def encoder_family(name):
    """What tells a text encoder: the last part of its name or folder, also in a hub cache."""
    parts = Path(str(name)).parts
    cached = [part for part in parts if re.fullmatch(r"models--.+--.+", part)]
    return cached[-1].split("--")[-1] if cached else Path(str(name)).name


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """What a set of text features was made with; travels in the data manifest and in the checkpoint."""

    encoder: str = DEFAULT_TEXT_ENCODER
    family: str = encoder_family(DEFAULT_TEXT_ENCODER)
    tokens: int = 77
    width: int = 768

    def check_same(self, other, ours, theirs):
        """Raise InputError unless `other` has the same encoder, tokens and width; ours, theirs: for the message."""
        for field in ("family", "tokens", "width"):
            a, b = getattr(self, field), getattr(other, field)
            if a != b:
                raise InputError(
                    f"text encoder mismatch: {ours} has {field} {a} ({self.encoder}), {theirs} has {field} {b} "
                    f"({other.encoder}); use --text-encoder {self.encoder}, or encode the captions again"
                )


def import_transformers(purpose):
    """The package, or an InputError that says what it is needed for."""
    try:
        import transformers  # seconds to import; training and sampling of classes never need it
    except ImportError:
        raise InputError(f"{purpose} needs a package: pip install transformers") from None
    return transformers


def first_line(error):
    """One line of an exception's text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class TextEncoder:
    """A CLIP text model with its tokenizer and spec; a caption longer than L tokens is cut, with one warning."""

    def __init__(self, tokenizer, model, spec, device="cpu"):
        self.tokenizer, self.spec = tokenizer, spec
        self.model = model.eval().requires_grad_(False).to(device)
        self.has_warned = False

    @classmethod
    def load(cls, name=DEFAULT_TEXT_ENCODER, device="cpu"):
        """Load by hub name or folder. Raises InputError when it is not there."""
        transformers = import_transformers("encoding text")
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(str(name))
            model = transformers.CLIPTextModel.from_pretrained(str(name), dtype=torch.float32)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"cannot load the text encoder '{name}' ({first_line(error)}); pass --text-encoder with a folder that "
                "holds a CLIP text model and its tokenizer, or connect to the hub once"
            ) from None
        config = model.config
        spec = TextSpec(str(name), encoder_family(name), config.max_position_embeddings, config.hidden_size)
        return cls(tokenizer, model, spec, device)

    @torch.no_grad()
    def __call__(self, captions):
        """List of N captions → float32 (N, L, W): the last hidden state, padded to L tokens, without a mask."""
        self._warn(captions)
        length = self.spec.tokens
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        return self.model(input_ids=ids.to(self.model.device)).last_hidden_state.float()

    def _warn(self, captions):
        if self.has_warned:
            return
        lengths = [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > self.spec.tokens:
            self.has_warned = True
            note(
                f"warning: '{captions[longest][:60]}…' has {lengths[longest]} tokens and is cut to {self.spec.tokens}, "
                "as are other captions that long (said once)"
            )

"""The text encoder of text-to-image: captions → CLIP's features of each token. transformers is imported only here.

Letters: N captions, L tokens (a caption is padded or cut to L), W width of the features.
"""

from pathlib import Path

import torch

from common.errors import note
from models.hub import fetching, load_complete
from models.identity import content_sha256, parameters_of
from models.specs import DEFAULT_TEXT_ENCODER, TextSpec, encoder_family


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
        return self.padded(captions)

    def padded(self, captions):
        """As __call__, without a warning."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokenizer(captions, **options)["input_ids"]

    def facts(self):
        """What determines the ids: the vocabulary, and the ids of a thousand words, of these joined, and of no text."""
        vocabulary = self.tokenizer.get_vocab()
        words = sorted(filter(str.isascii, vocabulary))  # library versions normalise others differently
        words = words[:: len(words) // 1000 + 1]
        return {"vocabulary": vocabulary, "ids": self.padded([*words, " ".join(words), ""]).tolist()}


def load_clip(kind, name, device, flag):
    """(tokenizer, model of transformers' class `kind`) by hub name or folder, float32. Raises InputError."""
    import transformers  # takes seconds, and training and sampling of classes never need it

    name = str(name)
    places = [str(Path(name, part)) for part in ("tokenizer", "text_encoder")]  # of a pipeline folder
    tokenizer_place, place = places if Path(places[1]).is_dir() else (name, name)
    with fetching(f"'{name}'", name, f"pass {flag} with the folder of a CLIP model and its tokenizer"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_place)
        model = load_complete(getattr(transformers, kind), place)
        size, needed = len(tokenizer), getattr(model.config, "text_config", model.config).vocab_size
        if not needed / 2 < size <= needed:  # transformers creates an empty one if files are missing
            raise ValueError(f"its tokenizer has {size} words instead of {needed}")
    return tokenizer, model.float().eval().requires_grad_(False).to(device)


class TextEncoder:
    """A CLIP text model with its tokenizer and spec, by hub name or folder. Raises InputError if loading fails."""

    def __init__(self, name=DEFAULT_TEXT_ENCODER, device="cpu"):
        tokenizer, self.model = load_clip("CLIPTextModel", name, device, "--text-encoder")
        config = self.model.config
        self.tokens = Tokens(tokenizer, config.max_position_embeddings)
        facts = {key: getattr(config, key) for key in ("hidden_act", "layer_norm_eps", "num_attention_heads")}
        network = getattr(self.model, "text_model", self.model)  # transformers 4 nests all weights in it
        sha256 = content_sha256(parameters_of(network), "", {**facts, **self.tokens.facts()})
        self.spec = TextSpec(str(name), encoder_family(name), self.tokens.length, config.hidden_size, sha256)

    @torch.no_grad()
    def __call__(self, captions):
        """List of N captions → float32 (N, L, W): the last hidden state, padded to L tokens, without a mask."""
        ids = self.tokens(captions).to(self.model.device, non_blocking=True)
        return self.model(input_ids=ids).last_hidden_state.float()

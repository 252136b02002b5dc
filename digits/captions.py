"""Captions of the handwritten digits in several wordings, and a small text encoder for them: the quickstart's text.

    python -m digits.captions --digits quickstart/digits --dest quickstart/text

writes DEST/captions.json, DEST/encoder (a CLIP text model of random weights: its features of different words differ,
which is all that is needed of it) and DEST/prompts.txt: ten prompts of each digit that no caption says in these words.
"""

import dataclasses
import random
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import write_atomically, write_json
from common.flags import parse_early, parse_flags, required


@dataclasses.dataclass
class CaptionFlags:
    digits: str = required("image folder that digits/data.py made")
    dest: str = required("folder of the captions, the text encoder and the prompts")


if __name__ == "__main__":
    parse_early(CaptionFlags, __doc__)

import torch

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = {name: digit for digit, word in enumerate(WORDS) for name in (word, str(digit))}
WORDINGS = (
    "{}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "a {} by hand",
    "a picture of a {}",
    "a scan of the number {}",
    "somebody wrote a {}",
    "the handwritten digit {}",
    "a white {} on black",
)
PER_IMAGE = 3  # captions
TOKENS, WIDTH = 16, 64
SEED = 0


def split_phrases(digit):
    """(trained, held out) phrases of a digit, ten each: of each wording one spelling is trained, the other held out."""
    spellings = (WORDS[digit], digit)
    trained = [wording.format(spellings[(digit + w) % 2]) for w, wording in enumerate(WORDINGS)]
    return trained, [wording.format(spellings[(digit + w + 1) % 2]) for w, wording in enumerate(WORDINGS)]


def digit_of(text, where="prompt"):
    """The digit that a prompt or label names; `where` it stands is for the message. Raises InputError."""
    found = [DIGITS[word] for word in text.split() if word in DIGITS]
    if not found:
        raise InputError(f"{where} {text!r} names no digit; give one from 0 to 9, or zero to nine")
    return found[0]


def caption_images(digits):
    """{CLASS/FILE: captions} of an image folder with a subfolder per digit; the same on every machine."""
    paths, rng = sorted(Path(digits).glob("[0-9]/*.png")), random.Random(SEED)
    if not paths:
        raise InputError(f"--digits {digits} holds no digits; make them with python -m digits.data")
    return {
        f"{path.parent.name}/{path.name}": rng.sample(split_phrases(int(path.parent.name))[0], PER_IMAGE)
        for path in paths
    }


def vocabulary(phrases):
    """(tokens, merges) of a byte-pair code that reads every word of the phrases letter by letter into one token."""
    words = sorted({word for text in phrases for word in text.split()})
    letters = sorted(set("".join(words)))
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append(f"{left} {right}")
            left += right
    return [*tokens, "<|startoftext|>", "<|endoftext|>"], merges


def write_encoder(folder, phrases):
    """A CLIP text model of random weights and its tokenizer, as from_pretrained reads them."""
    import transformers

    tokens, merges = vocabulary(phrases)
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    write_atomically(folder / "merges.txt", lambda file: file.write("\n".join(["#version: 0.2", *merges, ""]).encode()))
    write_json(folder / "tokenizer_config.json", {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"})
    torch.manual_seed(SEED)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    lengths, end = {"vocab_size": len(tokens), "max_position_embeddings": TOKENS}, len(tokens) - 1
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPTextConfig(**sizes, **lengths, **special)
    transformers.CLIPTextModel(config).save_pretrained(folder)


def write_all(digits, dest):
    """Captions, encoder and prompts; returns the number of captions."""
    dest, captions = Path(dest), caption_images(digits)
    split = [split_phrases(digit) for digit in range(len(WORDS))]
    write_encoder(dest / "encoder", [text for trained, _ in split for text in trained])
    prompts = "".join(text + "\n" for _, held_out in split for text in held_out)
    write_atomically(dest / "prompts.txt", lambda file: file.write(prompts.encode()))
    write_json(dest / "captions.json", captions)
    return sum(map(len, captions.values()))


def main(argv=None):
    args = parse_flags(CaptionFlags, argv, __doc__)
    print(f"wrote {write_all(args.digits, args.dest)} captions and a text encoder to {args.dest}")
    captions = f"--annotations {args.dest}/captions.json --text-encoder {args.dest}/encoder"
    print(f"next: python -m preprocessing.dataset_tools captions --source DATA/images --dest DATA/text {captions}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

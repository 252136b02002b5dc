"""Reading prompts: words of the command line, text files, COCO's captions, GenEval's records."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import read_lines
from common.records import read_record_lines
from latents.captions import read_annotations


@dataclasses.dataclass
class PromptList:
    """Prompts with the file they are from, and GenEval's records of them, or None."""

    texts: list
    path: Path | None = None
    metadata: list | None = None


@dataclasses.dataclass
class GenEvalPrompt:
    """What is read of GenEval's records {tag, include, prompt, …}; a result's folder gets all of them."""

    prompt: str


def read_prompts(given, seed):
    """PromptList from the words of --prompts: the prompts themselves, or one file. Raises InputError."""
    path = Path(given[0])
    looks_like_file = path.suffix in (".txt", ".json", ".jsonl") and " " not in given[0].strip()
    where = f"--prompts {path}"
    if len(given) > 1 or not (looks_like_file or os.path.isfile(path)):  # Path.is_file fails on a long prompt
        return PromptList([text.strip() for text in given])
    if path.suffix == ".json":
        return PromptList(one_caption_each(read_annotations(path, "--prompts"), seed, where), path)
    if path.suffix == ".jsonl":
        texts = [record.prompt for _, record in read_record_lines(GenEvalPrompt, path, where)]
        return PromptList(texts, path, [record for _, record in read_record_lines(dict, path, where)])
    return PromptList([text for _, text in read_lines(path, where)], path)


def one_caption_each(captions, seed, where):
    """A caption of every image, in the order of the names, drawn by (seed, number of the image). Raises InputError."""
    groups = [captions[name] for name in sorted(captions) if captions[name]]
    if not groups:
        raise InputError(f"{where} holds no captions; name another file")
    return [group[int(np.random.default_rng([seed, i, 0, 1]).integers(len(group)))] for i, group in enumerate(groups)]

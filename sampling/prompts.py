"""Reading prompts: words of the command line, text files, COCO's captions, GenEval's records."""

import dataclasses
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import read_json_lines, read_lines
from latents.captions import read_annotations


@dataclasses.dataclass
class PromptList:
    """Prompts with the file they are from, and GenEval's records of them, or None."""

    texts: list
    path: Path | None = None
    metadata: list | None = None


def read_prompts(given, seed):
    """PromptList from the words of --prompts: the prompts themselves, or one file. Raises InputError."""
    path = Path(given[0])
    looks_like_file = path.suffix in (".txt", ".json", ".jsonl") and " " not in given[0].strip()
    where = f"--prompts {path}"
    if len(given) > 1 or not (looks_like_file or is_file(path)):
        return PromptList([text.strip() for text in given])
    if path.suffix == ".json":
        return PromptList(one_caption_each(read_annotations(path, "--prompts"), seed, where), path)
    if path.suffix == ".jsonl":
        records = read_geneval(path, where)
        return PromptList([record["prompt"] for record in records], path, records)
    return PromptList([text for _, text in read_lines(path, where)], path)


def is_file(path):
    """Whether there is such a file; a long prompt cannot be the name of one."""
    try:
        return path.is_file()
    except OSError:
        return False


def one_caption_each(captions, seed, where):
    """A caption of every image, in the order of the names, drawn by (seed, number of the image). Raises InputError."""
    groups = [captions[name] for name in sorted(captions) if captions[name]]
    if not groups:
        raise InputError(f"{where} holds no captions; name another file")
    return [group[int(np.random.default_rng([seed, i, 0, 1]).integers(len(group)))] for i, group in enumerate(groups)]


def read_geneval(path, where):
    """GenEval's records {tag, include, prompt, …}. Raises InputError naming the line."""
    records = read_json_lines(path, where)
    for number, record in records:
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f"{where}, line {number}: not a record with a 'prompt'; restore the file")
    return [record for _, record in records]

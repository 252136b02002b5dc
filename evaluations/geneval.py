"""GenEval: check a folder of images before the detector sees it, and aggregate the detector's results afterwards.

    python -m evaluations.geneval check SAMPLES evaluation_metadata.jsonl
    python -m evaluations.geneval score results.jsonl [--samples SAMPLES --json results/NAME.json]

The detector itself (Mask2Former, mmdet 2) is not part of this repository: docs/text_to_image.md says how to run it.
The overall score is the mean of the accuracies of the six tags, each of which counts the same.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal, get_args

from common.errors import InputError, exit_on_input_error
from common.flags import Range, flag, parse_commands, required
from common.records import check_record, read_record_lines
from evaluations.metrics.results import Result, json_flag, result_path
from sampling.stores import GENEVAL_IMAGES, ends_as_png

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TAGS = get_args(Tag)


@dataclasses.dataclass
class Detection:
    """What the detector says of an image."""

    tag: Tag
    correct: bool


@dataclasses.dataclass(kw_only=True)
class CheckFlags:
    """is the folder laid out as the detector reads it?"""

    samples: str = required("folder that generate_t2i.py made of the prompts", positional=True)
    metadata: str = required("GenEval's evaluation_metadata.jsonl", positional=True)
    images_per_prompt: int = flag(GENEVAL_IMAGES, "images of each prompt", range=Range(1))


@dataclasses.dataclass(kw_only=True)
class ScoreFlags:
    """accuracy of each tag and their mean"""

    results: str = required("the detector's JSON-lines file", positional=True)
    samples: str | None = flag(None, "folder that was scored; its manifest goes into the result", str, group="output")
    json: str | None = json_flag()


def check_layout(folder, metadata, images=GENEVAL_IMAGES):
    """What keeps the detector from scoring a folder as GenEval means it, one line per fault; empty: nothing.

    metadata: GenEval's JSON-lines file; images: number of images of each prompt.
    """
    folder, faults = Path(folder), []
    places = {folder / f"{number:05d}": record for number, (_, record) in enumerate(read_record_lines(dict, metadata))}
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; make it with generate_t2i.py --prompts {metadata}")
    for place, record in places.items():
        faults += check_prompt(place, record, images)
    others = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.isdigit() and path not in places]
    return faults + [f"{path} is no prompt of {metadata}" for path in others]


def check_prompt(place, record, images):
    """Faults of the folder of one prompt."""
    if not place.is_dir():
        return [f"{place} is missing"]
    faults, metadata = [], place / "metadata.jsonl"  # what the prompt's images show
    try:
        if [value for _, value in read_record_lines(dict, metadata)] != [record]:
            faults.append(f"{metadata} is not the record of its prompt alone")
    except InputError as error:
        faults.append(str(error))
    found = [p for p in (place / "samples").glob("*.png") if p.stem.isdigit()]
    if len(found) != images:
        faults.append(f"{place / 'samples'} holds {len(found)} images instead of {images}")
    return faults + [f"{p} is cut off" for p in sorted(found) if not ends_as_png(p)]


def aggregate(results):
    """{tag: accuracy, …, "overall": mean of the tags'} of the detector's records [(line, {tag, correct, …})].

    Raises InputError where a tag is missing or unknown.
    """
    groups = {tag: [] for tag in TAGS}
    for number, record in results:
        detection = check_record(Detection, record, f"line {number} of the results", "restore the file")
        groups[detection.tag].append(detection.correct)
    if empty := [tag for tag, group in groups.items() if not group]:
        raise InputError(f"the results have no image of the tag {empty[0]}; score all prompts")
    scores = {tag: sum(group) / len(group) for tag, group in groups.items()}
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def check(args):
    """Print the faults; exit code 1 if there are any."""
    faults = check_layout(args.samples, args.metadata, args.images_per_prompt)
    print("\n".join(faults or [f"{args.samples}: laid out as GenEval reads it"]))
    if faults:
        sys.exit(1)


def score(args):
    """Print the accuracies, write them as JSON where asked."""
    scores = aggregate(read_record_lines(dict, args.results))
    print("\n".join(f"{tag:14} {score:.4f}" for tag, score in scores.items()))
    if args.json is not None:
        samples = args.samples or args.results
        metrics = {f"geneval_{tag}": score for tag, score in scores.items()}
        Result(metrics, samples, results=args.results).write(result_path(args.json, samples))


def main(argv=None):
    command, args = parse_commands({"check": CheckFlags, "score": ScoreFlags}, argv, __doc__)
    {"check": check, "score": score}[command](args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

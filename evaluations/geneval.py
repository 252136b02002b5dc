"""GenEval: check a folder of images before the detector sees it, and aggregate the detector's results afterwards.

    python -m evaluations.geneval check SAMPLES evaluation_metadata.jsonl
    python -m evaluations.geneval score results.jsonl [--metadata evaluation_metadata.jsonl --samples SAMPLES --json]

The detector itself (Mask2Former, mmdet 2) is not part of this repository: docs/text_to_image.md says how to run it.
The overall score is the unweighted mean of the six tags' accuracies. Results that lack images or hold one twice are
refused; only --metadata tells whether the last prompts are there.
"""

import collections
import dataclasses
import re
import sys
from pathlib import Path, PurePath
from statistics import fmean
from typing import Literal, get_args

from common.errors import InputError, exit_on_input_error
from common.flags import Range, flag, parse_commands, required
from common.records import read_record_lines
from evaluations.metrics.results import AFTER_CHECK, Result, ResultFlags
from sampling.flags import GENEVAL_IMAGES
from sampling.stores import GenEvalFiles

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TAGS = get_args(Tag)
PER_PROMPT = Range(1, 1000)


@dataclasses.dataclass
class Detection:
    """What the detector says of an image."""

    tag: Tag
    correct: bool
    filename: str = ""  # …/00000/samples/0000.png
    prompt: str = ""

    @property
    def name(self):
        """Name in the folder that was scored: 00000/samples/0000.png."""
        return "/".join(PurePath(self.filename).parts[-3:])

    @property
    def place(self):
        """Folder of the prompt, 00000; the prompt itself if the file name does not give it."""
        return self.name.partition("/")[0] if "/" in self.name else self.prompt


@dataclasses.dataclass
class Prompt:
    """A line of GenEval's metadata."""

    tag: Tag
    prompt: str


@dataclasses.dataclass(kw_only=True)
class CheckFlags:
    """is the folder laid out as the detector reads it?"""

    samples: str = required("folder that generate_t2i.py made of the prompts", positional=True)
    metadata: str = required("GenEval's evaluation_metadata.jsonl", positional=True)
    images_per_prompt: int = flag(GENEVAL_IMAGES, "images per prompt", range=PER_PROMPT)


@dataclasses.dataclass(kw_only=True)
class ScoreFlags(ResultFlags):
    """accuracy of each tag and their mean"""

    results: str = required("the detector's JSON-lines file", positional=True)
    samples: str | None = flag(None, "folder that was scored; its manifest goes into the result", str, group="data")
    metadata: str | None = flag(None, "evaluation_metadata.jsonl, whose prompts must all occur", str, group="data")
    images_per_prompt: int = flag(GENEVAL_IMAGES, "images per prompt", range=PER_PROMPT, group="data")


def check_layout(folder, metadata, images=GENEVAL_IMAGES):
    """Reasons why the detector would not score a folder with `images` per prompt as in GenEval, one line each."""
    folder, records = Path(folder), [record for _, record in read_record_lines(dict, metadata)]
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; make it with generate_t2i.py --prompts {metadata}")
    store = GenEvalFiles(folder, records, images)
    made = [store.path(index) for index in range(len(records) * images)]
    faults = [f"{path} is missing or damaged" for path in made if not (path.is_file() and store.is_whole(path))]
    for number, record in enumerate(records):
        path = folder / f"{number:05d}/metadata.jsonl"  # describes what the prompt's images show
        try:
            if [found for _, found in read_record_lines(dict, path)] != [record]:
                faults.append(f"{path} is not the record of just its prompt")
        except InputError as error:
            faults.append(str(error))
    others = {path for path in folder.glob("[0-9]*/samples/[0-9]*.png") if path.stem.isdigit()} - {*made}
    others |= {path for path in folder.glob("[0-9]*") if path.name.isdigit()} - {path.parents[1] for path in made}
    return faults + [f"{path} belongs to no prompt of {metadata}" for path in sorted(others)]


def faults_of(detections, images, metadata=None, samples=None):
    """Why results are incomplete, one line per fault; empty if they are complete.

    images: number per prompt; metadata: [Prompt] that must all occur; samples: folder whose images must all occur.
    """
    names = collections.Counter(found.name or "an image without a file name" for found in detections)
    faults = [f"{name} is there {number} times" for name, number in names.items() if number > 1]
    if metadata is None:
        found = collections.Counter(found.place for found in detections)
        expected = dict.fromkeys(found, images)
        numbers = {int(place) for place in found if re.fullmatch("[0-9]{1,9}", place)}
        if gaps := max(numbers, default=-1) + 1 - len(numbers):
            first = next(number for number in range(len(numbers) + 1) if number not in numbers)
            faults.append(f"{gaps} prompts are missing, the first is {first:05d}")
    else:
        found = collections.Counter(f"{found.tag}: {found.prompt}" for found in detections)
        prompts = collections.Counter(f"{record.tag}: {record.prompt}" for record in metadata)
        expected = {prompt: images * number for prompt, number in prompts.items()}
    for prompt in {**expected, **found}:
        if found[prompt] != expected.get(prompt, 0):
            faults.append(f"prompt {prompt!r} has {found[prompt]} images instead of {expected.get(prompt, 0)}")
    files = sorted(Path(samples).glob(GenEvalFiles.pattern)) if samples else ()
    return faults + [f"{path} is not there" for path in files if path.relative_to(samples).as_posix() not in names]


def aggregate(detections):
    """{tag: accuracy, …, "overall": mean of the tags}. Raises InputError if a tag is missing."""
    groups = {tag: [found.correct for found in detections if found.tag == tag] for tag in TAGS}
    if empty := [tag for tag, group in groups.items() if not group]:
        raise InputError(f"the results have no image of the tag {empty[0]}; score all prompts")
    scores = {tag: fmean(group) for tag, group in groups.items()}
    return {**scores, "overall": fmean(scores.values())}


def check(args):
    """Print the faults; exit code 1 if there are any."""
    faults = check_layout(args.samples, args.metadata, args.images_per_prompt)
    then = "next: run GenEval's detector, then python -m evaluations.geneval score"
    print("\n".join(faults or [f"{args.samples}: laid out as GenEval reads it", then]))
    sys.exit(bool(faults))


def score(args):
    """Print accuracies with their counts, and write them with --json. Raises InputError if results are incomplete."""
    metadata = args.metadata and [record for _, record in read_record_lines(Prompt, args.metadata)]
    path = args.result_path(samples := args.samples or args.results)
    if args.check_only:
        return print(f"ready to score {args.results}\n{AFTER_CHECK}")
    detections = [found for _, found in read_record_lines(Detection, args.results)]
    accepted = []
    if faults := faults_of(detections, args.images_per_prompt, metadata, args.samples):
        others = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        accepted = args.refuse(f"{args.results}: {faults[0]}{others}")
    detections = list({found.name or number: found for number, found in enumerate(detections)}.values())
    scores = aggregate(detections)
    for tag, value in scores.items():
        of_tag = [found for found in detections if tag in (found.tag, "overall")]
        print(f"{tag:14} {value:.4f}  {len(of_tag)} images of {len({found.place for found in of_tag})} prompts")
    metrics = {f"geneval_{tag}": value for tag, value in scores.items()}
    Result(metrics, samples, results=args.results, count=len(detections), warnings=accepted).write(path)


def main(argv=None):
    command, args = parse_commands({"check": CheckFlags, "score": ScoreFlags}, argv, __doc__)
    {"check": check, "score": score}[command](args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

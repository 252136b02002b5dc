"""A study file (TOML): variants of a training run, seeds, measurements. docs/studies.md explains the keys."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.errors import InputError
from common.files import read_bytes
from common.flags import parse_flags, shown, words_of
from common.records import FileName, Finite, Whole, parse_record, read_record
from evaluations.metrics.results import Result
from models.checkpoints import checkpoint_path
from training.config import FlowMapConfig, TextTrainConfig, TrainConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

CONFIGS = {"train.py": TrainConfig, "train_dmf.py": FlowMapConfig, "train_t2i.py": TextTrainConfig}
OWN = {"--exp-name", "--output-dir", "--seed", "--resume", "--epochs"}  # flags that a study sets
REMEDY = "correct the study file (docs/studies.md)"
One = bool | int | Finite | str
Flags = dict[str, One | list[One]]
Axis = Annotated[dict[str, Annotated[list[One], Field(min_length=1)]], Field(max_length=1)]


@dataclasses.dataclass
class Study:
    """The content of a study file."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    variants: Annotated[dict[FileName, Flags], Field(min_length=1)]
    baseline: str  # the variant that the others are compared with
    seeds: Annotated[list[Whole], Field(min_length=1)]
    fields: Annotated[list[str], Field(min_length=1)]  # of log.jsonl; for the first, lower is better
    about: str = ""  # printed above the tables
    launch: str = "python"  # what starts the program
    program: Literal[tuple(CONFIGS)] = "train.py"
    flags: Flags = dataclasses.field(default_factory=dict)  # of all variants
    axis: Axis = dataclasses.field(default_factory=dict)  # a flag and the values that every variant is tried with
    measure: dict[FileName, list[str]] = dataclasses.field(default_factory=dict)  # name: shell commands


def read_study(path, out):
    """(Study, its Runs in the folder `out`) from a TOML file. Raises InputError naming file and key."""
    try:
        content = tomllib.loads(read_bytes(path, "name a study file").decode())
    except ValueError as error:
        raise InputError(f"{path} is not TOML ({error}); correct it") from None
    study = parse_record(Study, json.dumps(content, default=str), path, REMEDY)
    if study.baseline not in study.variants:
        raise InputError(f"{path}: baseline {study.baseline!r} is none of {', '.join(study.variants)}; {REMEDY}")
    values = next(iter(study.axis.values()), [None])
    # seed by seed, so that an unfinished study already compares all variants
    order = itertools.product(study.seeds, study.variants, values)
    runs = [Run(study, Path(out), variant, value, seed) for seed, variant, value in order]
    known = {shown(field.name) for field in dataclasses.fields(CONFIGS[study.program])} - OWN
    for run in runs:
        if wrong := run.flags.keys() - known:
            why = "a study sets it" if wrong & OWN else f"{study.program} has no such flag"
            raise InputError(f"{path}: {run.variant}: {min(wrong)}: {why}; {REMEDY}")
        try:
            run.config.check()
        except InputError as error:
            raise InputError(f"{path}: {run.variant}: {error}") from None
    return study, list({run.name: run for run in runs}.values())


@dataclasses.dataclass
class Run:
    """One training run of a study, an ordinary run folder in `out`."""

    study: Study
    out: Path
    variant: str
    value: One | None  # of the axis
    seed: int

    @property
    def key(self):
        return self.variant, self.value, self.seed

    @property
    def name(self):
        axis = "".join(f"-{name}" + re.sub(r"[/\\:]", "_", str(self.value)) for name in self.study.axis)
        return f"{self.variant}{axis}-seed{self.seed}"

    @property
    def folder(self):
        return self.out / self.name

    @property
    def flags(self):
        """{flag: value}: those of the variant override the common ones, and the axis overrides both."""
        parts = (self.study.flags, self.study.variants[self.variant], dict.fromkeys(self.study.axis, self.value))
        return {shown(name): value for part in parts for name, value in part.items()}

    @property
    def words(self):
        """The command line of the training program."""
        words = ["--exp-name", self.name, "--output-dir", str(self.out), "--seed", str(self.seed), "--resume", "auto"]
        return words + [word for name, value in self.flags.items() for word in words_of(name, value)]

    @functools.cached_property
    def config(self):
        """The configuration that the words give on this machine. Raises InputError."""
        return parse_flags(CONFIGS[self.study.program], self.words).resolve()

    @property
    def ckpt(self):
        return checkpoint_path(self.folder, self.config.max_train_steps)

    @property
    def results(self):
        """{measurement: its JSON file}, whose name depends on the commands."""
        digests = {name: hashlib.sha256(json.dumps(lines).encode()) for name, lines in self.study.measure.items()}
        place = self.folder / "measured" / self.ckpt.stem
        return {name: place / f"{name}-{digest.hexdigest()[:8]}.json" for name, digest in digests.items()}

    def stages(self):
        """Yield (name, shell line, function that raises InputError unless the line's result exists)."""
        long = ["--epochs", str(self.config.max_train_steps)]  # of at least one step each: they never end the run
        yield "train", shlex.join([*self.study.launch.split(), self.study.program, *self.words, *long]), self.check
        for name, result in self.results.items():
            first, *rest = self.study.measure[name]
            samples = result.parent / f"samples-{hashlib.sha256(first.encode()).hexdigest()[:8]}"
            line = " && ".join([first, *rest])
            known = {"ckpt": self.ckpt, "run": self.folder, "samples": samples, "out": result, "seed": self.seed}
            for word, value in known.items():
                line = line.replace(f"{{{word}}}", shlex.quote(str(value)))
            yield name, line, functools.partial(Result.read, result, "measure it again")

    def unfinished(self):
        """[(name, line, check)] of the stages whose results are missing or cannot be read."""
        found = []
        for name, line, check in self.stages():
            try:
                check()
            except InputError:
                found.append((name, line, check))
        return found

    def check(self):
        """Raise InputError unless the last checkpoint exists and was trained with the flags of the study."""
        if not self.ckpt.is_file():
            raise InputError(f"{self.ckpt} is not there; start the study again")
        saved = read_record(dict, self.folder / "config.json", "move the run away")
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        free = {field.name for field in dataclasses.fields(self.config) if field.metadata["free"]}
        free |= {"mixed_precision"} - {name for name in now if shown(name) in self.flags}  # depends on the machine
        if changed := [name for name in now.keys() - free if name in saved and saved[name] != now[name]]:
            change = f"{shown(changed[0])} {saved[changed[0]]}, now {now[changed[0]]}"
            raise InputError(f"{self.folder} was trained with other flags ({change}); move it away")

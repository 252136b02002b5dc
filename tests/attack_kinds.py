"""What tests/attack.py does to a program: each kind is a function (command, folder, chance) → Plan, or raises Skip."""

import dataclasses
import functools
import itertools
import json
import os
import re
import resource
import shutil

import programs
import torch

TEXTS = ("", " ", "x", "../x", "/proc", ".", "a/b", "a:b", "a\nb", "é", "-1", "0", "1e-400", "nan", "inf", "-inf")
TEXTS += ("0.5", "2", "[1]", "None", "1,1", "1,2", "999999999", "1" + 20 * "0", 5000 * "x", "?")
AMOUNTS = r"--(max-train-steps|num-.*steps|num.*-samples|sampling-steps|epochs|steps|images-per-prompt)"
VALUES = (None, True, -1, 0, 1.5, 10**20, float("nan"), "", "x", "../x", [], [1], [[]], {}, {"a": 1})
STRAYS = (".DS_Store", "._0.png", "Thumbs.db", "0000009.pt.tmp", "x.pt", "notes.txt", ".ipynb_checkpoints")
OPTIONAL = ("wandb", "tensorboard", "matplotlib", "transformers", "timm", "sklearn", "torchvision", "torch_fidelity")
SURROUNDINGS = {  # environments whose results must be the undisturbed ones
    "without a home": {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"},
    "without a folder for temporary files": {"TMPDIR": "/nonexistent"},
    "with accelerate set up otherwise": {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_MIXED_PRECISION": "fp16",
    },
    "in a narrow terminal": {"COLUMNS": "1", "LINES": "1", "TERM": "dumb", "TQDM_DISABLE": ""},
}
INTERPRETERS = {  # options and environment of Pythons that have to be started anew
    "without docstrings": (("-OO",), {}),
    "in the C locale": ((), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "where warnings of ours are errors": (("-W", "error:::common", "-W", "error:::training"), {}),
}
CHECKED = (".pt", ".npz", ".png", ".zip")  # formats in which a flipped bit cannot be overlooked
TEXT = (".json", ".jsonl", ".txt")  # what is left of a text may be a text


@dataclasses.dataclass
class Plan:
    """How a program is to be started, and what may come of it."""

    words: tuple
    detail: str
    touched: tuple = ()  # files that the attack put in place or damaged: what becomes of them is not compared
    same: bool = False  # a program that does not refuse must have the undisturbed result
    again: bool = False  # without the disturbance, the same command must then come to the undisturbed result
    limits: tuple = ()
    environment: dict = dataclasses.field(default_factory=dict)
    interpreter: tuple | None = None
    copies: int = 1
    killed_at: float | None = None  # share of the undisturbed time
    room: int | None = None  # bytes left on the disk
    read_only: bool = False


class Skip(Exception):
    """The kind of attack does not fit the command."""


def files_of(command, folder, wanted=lambda path: True):
    """The files that the command reads; raises Skip if it reads none of that kind."""
    found = {path for pattern in command.reads for path in folder.glob(pattern) if path.is_file() and wanted(path)}
    if not found:
        raise Skip
    return sorted(found)


@functools.cache
def flags_of(program):
    """All flags of a program, as its --help shows them."""
    return sorted(set(re.findall(r"--[a-z][a-z0-9-]+", programs.run(*program, "--help").stdout)) - {"--help"})


def text_for(name, chance):
    """An odd value for a flag; no amount that would only take long."""
    texts = [text for text in TEXTS if text not in ("999999999", "2") or not re.fullmatch(AMOUNTS, name)]
    return chance.choice(texts)


# --------------------------------------------------------------------------------------------------- flags and files


def odd_flag(command, folder, chance):
    """Give one of the command's flags, or its argument, an odd value."""
    words = list(command.words)
    places = [i for i, word in enumerate(words[:-1]) if word.startswith("--") and "=" not in word]
    place = chance.choice(places) if places else len(words) - 2
    words[place + 1] = text_for(words[place], chance)
    return Plan(words, f"{words[place]} {words[place + 1][:50]!r}")


def any_flag(command, folder, chance):
    """Add a flag of the program that is not given, with an odd value."""
    program = itertools.takewhile(lambda word: not word.startswith("--") and "/" not in word, command.words)
    if not (names := flags_of(tuple(program))):
        raise Skip
    name = chance.choice(names)
    text = text_for(name, chance)
    return Plan([*command.words, f"{name}={text}"], f"{name}={text[:50]!r}")


def odd_json(command, folder, chance):
    """Replace a node of a JSON file that the command reads, or break the text."""
    path = chance.choice(files_of(command, folder, lambda path: path.suffix in (".json", ".jsonl")))
    text, way = path.read_text(), chance.choice(("cut", "mark", "deep", "node", "node", "node"))
    if way == "cut":
        damaged = text[: chance.randrange(len(text))]
    elif way == "mark":
        damaged = "\ufeff" + text
    elif way == "deep":
        damaged = 5000 * "[" + 5000 * "]"
    else:
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        number = chance.randrange(len(lines))
        lines[number] = json.dumps(replaced(json.loads(lines[number]), chance.choice(VALUES), chance))
        damaged = "\n".join(lines) + "\n"
    path.write_text(damaged)
    return Plan(command.words, f"{path.relative_to(folder)} ({way}): {damaged[:200]!r}")


def replaced(content, value, chance):
    """The nested value with one of its nodes replaced by `value`."""
    if not isinstance(content, dict | list) or not content or chance.random() < 0.1:
        return value
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key = chance.choice(keys)
    new = replaced(content[key], value, chance)
    return {**content, key: new} if isinstance(content, dict) else [*content[:key], new, *content[key + 1 :]]


def damaged_file(command, folder, chance):
    """Cut a file, empty it, fill it with zeros or flip one of its bits."""
    files = files_of(command, folder)
    suffix = chance.choice(sorted({path.suffix for path in files}))  # every kind of file as often
    path = chance.choice([path for path in files if path.suffix == suffix])
    data, way = bytearray(path.read_bytes()), chance.choice(("cut", "emptied", "zeroed", "flipped"))
    place = chance.randrange(max(1, len(data)))
    if way == "flipped" and data:
        data[place] ^= 1 << chance.randrange(8)
    else:
        data = {"cut": data[:place], "zeroed": bytes(len(data))}.get(way, b"")
    path.write_bytes(data)
    same = suffix in CHECKED or (way != "flipped" and suffix not in TEXT)
    return Plan(command.words, f"{path.relative_to(folder)} {way} at {place}", (path,), same)


def odd_entry(command, folder, chance):
    """Replace a node of a checkpoint by something of another type or shape."""
    path = chance.choice(files_of(command, folder, lambda path: path.suffix == ".pt" and path.name != "corners.pt"))
    content = torch.load(path, weights_only=True)
    values = (*VALUES, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.full((), float("nan")))
    content = replaced(content, chance.choice(values), chance)
    torch.save(content, path)
    return Plan(command.words, f"an entry of {path.relative_to(folder)}")


def odd_path(command, folder, chance):
    """Put a folder, a pipe or a link to itself in place of a file that is read, or a file in place of a folder."""
    path, way = chance.choice(files_of(command, folder)), chance.choice(("folder", "pipe", "loop", "file", "gone"))
    if way == "file" and path.parent != folder:
        path = path.parent
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "pipe":
            os.mkfifo(path)
        elif way != "gone":
            path.symlink_to(path)
    return Plan(command.words, f"{path.relative_to(folder)} is a {way}")


def stray(command, folder, chance):
    """Put files that systems and people leave behind beside the command's files."""
    path, name = chance.choice(files_of(command, folder)), chance.choice(STRAYS)
    place = path.with_name(name)
    if name == ".ipynb_checkpoints":
        place.mkdir(exist_ok=True)
        place = place / f"copy{path.suffix}"
    shutil.copyfile(path, place)
    return Plan(command.words, f"{place.relative_to(folder)}", (place,), same=True)


# ---------------------------------------------------------------------------------------------------------- resources


def file_limit(command, folder, chance):
    """Limit the size of files, as a quota does."""
    limit = int(2 ** chance.uniform(14, 21))  # less would silence the command: its own output goes to a file
    limits = ((resource.RLIMIT_FSIZE, limit),)
    return Plan(command.words, f"files up to {limit} bytes", same=True, again=True, limits=limits)


def full_disk(command, folder, chance):
    """Leave little room on the disk that everything is on."""
    room = int(2 ** chance.uniform(12, 21))
    return Plan(command.words, f"{room} bytes left", same=True, again=True, room=room)


def few_files(command, folder, chance):
    """Limit the number of open files."""
    number = chance.choice((16, 24, 40, 64))
    limits = ((resource.RLIMIT_NOFILE, number),)
    return Plan(command.words, f"{number} open files", same=True, again=True, limits=limits)


def two_at_once(command, folder, chance):
    """Start the command twice at once."""
    return Plan(command.words, "two at once", same=True, again=True, copies=2)


def killed(command, folder, chance):
    """Kill the command at any moment."""
    moment = chance.random()
    return Plan(command.words, f"killed at {moment:.2f} of its time", again=True, killed_at=moment)


def surroundings(command, folder, chance):
    """Take away or change what programs expect around them."""
    way = chance.choice((*SURROUNDINGS, *INTERPRETERS, "read-only", "without a package", "without a package"))
    plan = Plan(command.words, way, same=True, environment=SURROUNDINGS.get(way, {}))
    if way in INTERPRETERS:
        plan.interpreter, plan.environment = INTERPRETERS[way]
    elif way == "read-only":
        plan.read_only = plan.again = True
    elif way == "without a package":
        package = chance.choice(OPTIONAL)
        plan.words, plan.detail = ["tests/without.py", package, *command.words], f"without {package}"
        plan.interpreter = ()  # a fork has imported it already
    return plan


KINDS = {"odd flag": odd_flag, "any flag": any_flag, "odd JSON": odd_json, "damaged file": damaged_file}
KINDS |= {"odd entry": odd_entry, "odd path": odd_path, "stray file": stray, "file limit": file_limit}
KINDS |= {"full disk": full_disk, "few files": few_files, "two at once": two_at_once, "killed": killed}
KINDS |= {"surroundings": surroundings}
FREE = ("odd flag", "any flag", "odd JSON", "odd entry", "odd path")  # kinds that may change the result

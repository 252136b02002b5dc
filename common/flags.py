"""Command lines as dataclasses: a field is a flag; its help, default, range and group stand where it is declared.

@dataclasses.dataclass
class Config:
    ckpt: str = required("checkpoint")
    steps: int = flag(50, "sampler steps", group="sampling", range=Range(low=1))

config = parse_flags(Config, description=__doc__)
name, options = parse_commands({"pack": PackFlags, "verify": VerifyFlags}, description="...")

Modules that declare flags do not import torch, and a program begins with

if __name__ == "__main__":
    parse_early(Config, __doc__)  # before the imports that take seconds
"""

import argparse
import dataclasses
import math
import re
import sys
from pathlib import Path

from common.errors import InputError, did_you_mean, exit_on_input_error
from common.published_flags import translate

ROOT = Path(__file__).resolve().parent.parent
FlagTextError = argparse.ArgumentTypeError  # raised by a `kind` that cannot convert the text
HIDDEN = argparse.SUPPRESS  # help of a flag that --help leaves out


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite values with low <= value <= high and above < value < below."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value):
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self):
        bounds = {"at least": self.low, "greater than": self.above, "at most": self.high, "less than": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)) or "finite"


LARGEST = 10**9  # bound of whole numbers without one of their own: no count here comes near it
SEED = Range(low=0, high=2**63 - 1)
IMAGES = Range(low=1, high=10**7)  # generated
BATCH = Range(low=1, high=2**20)  # rows computed at once
WORKERS = Range(low=1, high=1024)  # threads or processes
SAMPLER_STEPS = Range(low=1, high=10**5)
BLOCKS = Range(low=1, high=1000)  # of a network
CLASSES = Range(low=1, high=10**6)  # the label table of an XL model would have a billion parameters
SIDE = Range(low=1, high=2**14)  # pixels


def flag(default, help, kind=None, *, group=None, range=None, free=False, empty=False, **options):
    """A dataclass field that is also a command-line flag; `kind` converts its text (default: the default's type).

    group: heading in --help; range: a Range for the value or each value of a list, by default any finite number;
    free: does not affect results, so a resumed run may change it; empty: "" is a valid value. options go to argparse;
    `name`: the flag's name if it is not the field's; `also` lists other names, which --help leaves out.
    """
    kind = kind or type(default)
    range = range or (Range() if kind in (int, float) else None)
    if kind is int:
        low, high = (end if math.isfinite(end) else math.copysign(LARGEST, end) for end in (range.low, range.high))
        range = dataclasses.replace(range, low=int(low), high=int(high))
    metadata = {"help": help, "kind": kind, "group": group, "range": range, "free": free, "empty": empty, **options}
    return dataclasses.field(default=default, metadata=metadata)


def required(help, kind=str, **options):
    """A flag without a default; options as of `flag`, and positional=True: an argument without a name."""
    return flag(dataclasses.MISSING, help, kind, **options)


def shown(name):
    """A field's name as the flag that sets it."""
    return "--" + name.replace("_", "-")


def words_of(flag, value):
    """The words that give a flag a value: `--vera gap`, `--no-qk-norm`, `--df-idxs 4 8`."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, *map(str, value if isinstance(value, list | tuple) else [value])]


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except of flags that have none."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


STYLE = {"formatter_class": Formatter, "allow_abbrev": False}
EARLY = {}  # {(flags, words): result} of parse_early


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a one-line InputError."""

    def error(self, message):
        text = message.removeprefix("argument ")
        if found := re.fullmatch(r"(.*?): invalid choice: (.*) \(choose from (.*)\)", text, re.DOTALL):
            name, value, *choices = (word.strip("'\"") for word in (found[1], found[2], *found[3].split(", ")))
            text = f"{name} {value} is unknown; {did_you_mean(value, choices)}choose one of {', '.join(choices)}"
        elif found := re.fullmatch(r"(.*?): invalid (int|float) value: '(.*)'", text, re.DOTALL):
            text = f"{found[1]} {found[3]} is not a number; pass a {'whole ' * (found[2] == 'int')}number"
        else:
            text += "; --help lists all flags"
        raise InputError(text)


def parse_early(flags, description=None, epilog=None, argv=None):
    """Parse a program's command line before its slow imports: --help and mistakes end the program at once.

    flags: as for parse_flags or parse_commands, which then return this result for the same words.
    """
    words = sys.argv[1:] if argv is None else argv
    with exit_on_input_error():
        parse = parse_commands if isinstance(flags, dict) else parse_flags
        result = parse(flags, words, description, *([epilog] if epilog else []))
        EARLY[repr((flags, words))] = result


def parse_flags(cls, argv=None, description=None, epilog=None):
    """Parse the command line into a dataclass of `flag` fields; published flags (published_flags.py) are accepted too.

    Raises InputError for an unknown flag and for a value that cannot be read or is out of range.
    """
    words = sys.argv[1:] if argv is None else argv
    if parsed := EARLY.pop(repr((cls, words)), None):
        return parsed
    check_checkout()
    parser = Parser(description=description, epilog=epilog, **STYLE)
    own, also = add_flags(parser, cls)
    return check_ranges(cls(**vars(parser.parse_args(translate(words, own, also)))))


def parse_commands(commands, argv=None, description=None):
    """Parse `COMMAND FLAGS` → name, config; commands: {name: dataclass}, whose docstring's first line is the help."""
    words = sys.argv[1:] if argv is None else argv
    if parsed := EARLY.pop(repr((commands, words)), None):
        return parsed
    check_checkout()
    parser = Parser(description=description, **STYLE)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    names = {}
    for name, cls in commands.items():
        help = (cls.__doc__ or "").partition("\n")[0]  # python -OO drops docstrings
        names[name] = add_flags(choices.add_parser(name, help=help, description=help, **STYLE), cls)
    if words[:1] and words[0] in names:
        words = [words[0], *translate(words[1:], *names[words[0]])]
    values = vars(parser.parse_args(words))
    name = values.pop("command")
    return name, check_ranges(commands[name](**values))


def check_ranges(config):
    """Return the config. Raises InputError naming a flag that is empty or out of range; None passes."""
    for field in dataclasses.fields(config):
        allowed, values = field.metadata["range"], getattr(config, field.name)
        for value in values if isinstance(values, list | tuple) else [values]:
            name = field.metadata.get("name", shown(field.name))
            if value == "" and not field.metadata["empty"]:  # an empty path would be the current folder
                raise InputError(f"{name} is empty; give it a value, or leave it out")
            if allowed is not None and value is not None and value not in allowed:
                raise InputError(f"{name} {value} is out of range; it must be {allowed}")
    return config


def add_flags(parser, cls):
    """Add a dataclass's flags to a parser, under their group headings; returns their names, and {other name: name}."""
    groups, known, also = {None: parser}, {"--help"}, {}
    for field in dataclasses.fields(cls):
        options = {name: value for name, value in field.metadata.items() if name not in ("range", "free", "empty")}
        kind, group, others = options.pop("kind"), options.pop("group"), [shown(field.name), *options.pop("also", ())]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options |= {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if options.pop("positional", False):
            groups[group].add_argument(field.name, **options)
            continue
        options |= {"required": True} if field.default is dataclasses.MISSING else {"default": field.default}
        names = groups[group].add_argument(options.pop("name", others[0]), dest=field.name, **options).option_strings
        known.update(names)
        also |= {name.replace(names[0][2:], other[2:]): name for name in names for other in others}  # also --no-NAME
    return known, also


def check_checkout():
    """Raise InputError if a program of one checkout would run with the installed modules of another."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).resolve()
    own = next((folder for folder in script.parents if (folder / "common" / "flags.py").is_file()), ROOT)
    if own != ROOT and not script.is_relative_to(Path(sys.prefix).resolve()):  # where pytest lies, and other tools
        remedy = f"run pip install -e {own}, or start it as python -m from {own}"
        raise InputError(f"{script} would run with the modules of {ROOT}, which is installed here; {remedy}")

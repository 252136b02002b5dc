"""Attacks the programs: odd flags, damaged files, wrong kinds of path, full disks, kills, twin starts, environments.

    python tests/attack.py --seed 1 --attempts 20
    python tests/attack.py --repeat "odd flag:1000003"

Every attempt must be right, with the undisturbed result where the attack cannot change it, or end in one clear line;
after a disturbance from outside, the same command must come to the undisturbed result. What is tried is a pure function
of the kind and the number. Prints a table, and every attempt that failed. Everything happens in a temporary folder, and
on small disks in memory where the system permits this process mounts of its own.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import small_disk

DISKS = __name__ == "__main__" and small_disk.allow()  # before anything starts a thread

import argparse
import collections
import contextlib
import os
import random
import signal
import tempfile
import time

import programs
from attack_commands import COMMANDS, PRINTS, copy_of, environment, make_workspace, results
from attack_kinds import FREE, KINDS, Plan, Skip

TIME_LIMIT = 120  # seconds per program; each takes a few
SEED = 1_000_000  # numbers of attempts between those of two seeds
RIGHT, LINE = "right", "one clear line"


class Failed(Exception):
    """An attempt was not survived."""


def verdict(done):
    """RIGHT, LINE, or Failed for how a program ended."""
    code, last = done.returncode, last_line(done)
    if code < 0:
        raise Failed(f"signal {signal.Signals(-code).name}")
    if "Traceback (most recent call last)" in done.stderr + done.stdout:
        raise Failed(f"traceback: {last}")
    if code == 0:
        return RIGHT
    if (code == 2 and "error: " in last) or (code == 1 and "FAULT" in done.stdout):  # verify's
        return LINE
    raise Failed(f"exit code {code}: {last}")


def last_line(done):
    return (done.stderr.strip().splitlines() or [""])[-1][:200]


class Campaign:
    """A workspace to attack, and the undisturbed results of the commands."""

    def __init__(self, place):
        self.workspace, self.undisturbed = Path(place) / "workspace", {}
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            make_workspace(Path(place) / "w é").rename(self.workspace)

    def attempt(self, kind, name, chance):
        """(what was done, RIGHT or LINE or what went wrong); raises Skip where the attack does not fit."""
        try:
            wanted, seconds = (None, 0) if kind in FREE else self.expected(name)
        except Failed as failed:
            return "nothing", str(failed)
        with copy_of(self.workspace, DISKS) as folder:
            plan = KINDS[kind](COMMANDS[name].at(folder), folder, chance)
            if (plan.room or plan.read_only) and not DISKS:
                raise Skip
            try:
                return plan.detail, outcome(name, plan, folder, wanted, seconds)
            except Failed as failed:
                return plan.detail, str(failed)

    def expected(self, name):
        """(results, seconds) of a command that nothing disturbs."""
        if name not in self.undisturbed:
            with copy_of(self.workspace, DISKS) as folder:
                before = time.monotonic()
                done = end(start(Plan(COMMANDS[name].at(folder).words, "nothing"), folder))
                if verdict(done) != RIGHT:
                    raise Failed(f"undisturbed: {last_line(done)}")
                self.undisturbed[name] = results_of(name, folder, done), time.monotonic() - before
        return self.undisturbed[name]


def start(plan, folder):
    options = {"limits": plan.limits, "folder": folder / "here", "interpreter": plan.interpreter}
    return programs.start(*plan.words, **options, **{**environment(folder), **plan.environment})


def end(program, seconds=TIME_LIMIT):
    """Done of a program that ends within so many seconds."""
    try:
        code = program.wait(seconds)
    except TimeoutError:
        raise Failed(f"no end within {seconds} s") from None
    return programs.Done(code, *(path.read_text(errors="replace") for path in (program.stdout, program.stderr)))


def results_of(name, folder, done):
    return results(folder, done.stdout if name in PRINTS else "")


def outcome(name, plan, folder, wanted, seconds):
    """RIGHT or LINE; raises Failed. wanted, seconds: what the undisturbed command makes, and how long it takes."""
    if plan.room:
        small_disk.set_room(folder, plan.room)
    if plan.read_only:
        small_disk.set_read_only(folder)
    started = [start(plan, folder) for _ in range(plan.copies)]
    if plan.killed_at is not None:
        time.sleep(plan.killed_at * seconds)
        started[0].kill()
        started[0].process.join()
        ends = []
    else:
        done = [end(program) for program in started]
        ends = [verdict(one) for one in done]
        if plan.same and RIGHT in ends:
            compare(results_of(name, folder, done[ends.index(RIGHT)]), wanted, plan, folder)
    if plan.copies > 1 and RIGHT not in ends:
        raise Failed("none of them went on")
    if plan.again and RIGHT not in ends:
        if plan.room or plan.read_only:
            small_disk.set_room(folder, 1 << 30)
        done = end(start(Plan(COMMANDS[name].at(folder).words, "nothing"), folder))
        if verdict(done) != RIGHT:
            raise Failed(f"afterwards: {last_line(done)}")
        compare(results_of(name, folder, done), wanted, plan, folder, "afterwards ")
    return RIGHT if RIGHT in ends or not ends else LINE


def compare(found, wanted, plan, folder, when=""):
    """Raise Failed where a result is not the undisturbed one."""
    touched = {str(path.relative_to(folder)) for path in plan.touched}
    wrong = [key for key in sorted(found.keys() | wanted) if key not in touched and found.get(key) != wanted.get(key)]
    if wrong:
        raise Failed(f"{when}another result: {', '.join(wrong)[:200]}")


# -------------------------------------------------------------------------------------------------------- the command


def choices(kind, number):
    """The commands to try, the first that fits; every program has its turn in each kind."""
    seed, position = divmod(number, SEED)
    names = random.Random(f"{kind} {seed}").sample(list(COMMANDS), len(COMMANDS))
    first = position % len(names)
    return names[first:] + names[:first]


def run_attempt(campaign, kind, number):
    """(command, what was done, how it ended), or None where the kind fits no command here."""
    for name in choices(kind, number):
        with contextlib.suppress(Skip):
            return name, *campaign.attempt(kind, name, random.Random(f"{kind} {number}"))
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=10, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--repeat", nargs="+", default=(), metavar="KIND:NUMBER", help="attempts to repeat")
    args = parser.parse_args()
    chosen = [(kind, args.seed * SEED + i) for kind in args.kind or KINDS for i in range(args.attempts)]
    if args.repeat:
        chosen = [(kind, int(number)) for kind, number in (text.split(":") for text in args.repeat)]
    sys.modules["__main__"].__dict__.pop("__file__", None)  # or every fork would import this file
    with tempfile.TemporaryDirectory(prefix="attack-") as place:
        sys.exit(bool(report(Campaign(place), chosen)))


def report(campaign, chosen):
    """Run the attempts [(kind, number)]; prints those that failed, as they end, and the table; returns their number."""
    counts = collections.defaultdict(collections.Counter)
    for kind, number in chosen:
        if (tried := run_attempt(campaign, kind, number)) is None:
            continue
        name, detail, found = tried
        counts[kind][found if found in (RIGHT, LINE) else "failed"] += 1
        if found not in (RIGHT, LINE):
            print(f'python tests/attack.py --repeat "{kind}:{number}"  # {name}, {detail}: {found}', flush=True)
    columns = (RIGHT, LINE, "failed")
    print("", "| kind | tried | " + " | ".join(columns) + " |", "|---|---|---|---|---|", sep="\n")
    for kind, count in counts.items():
        print(f"| {kind} | {count.total()} | " + " | ".join(str(count[column]) for column in columns) + " |")
    return sum(count["failed"] for count in counts.values())


if __name__ == "__main__":
    main()

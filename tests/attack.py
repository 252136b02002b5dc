"""Attacks the programs with odd flags, damaged files, wrong kinds of path, small disks and twin starts.

    python tests/attack.py --seed 1 --attempts 500

Every attempt must succeed or end with one clear line; with damaged weights, only the line will do. The attempts are a
pure function of the seed. Prints a table of attempts tried and survived, and every attempt that was not survived.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import captioned
import programs
import tiny
import torch
from data_helpers import write_class_folders
from evaluation_helpers import pictures, save_npz, script

from evaluations import calculate_metrics

TIME_LIMIT = 120  # seconds per attempt; each takes a few
TEXTS = (
    "",
    " ",
    "x",
    "../x",
    "/",
    ".",
    "a/b",
    "a:b",
    "a\nb",
    "é",
    "-1",
    "0",
    "1e-400",
    "nan",
    "inf",
    "-inf",
    "1" + 20 * "0",
)
TEXTS += ("0.5", "2", "[1]", "None", "1,1", "1,2", "999999999", "\ud800")
VALUES = (None, True, -1, 0, 1.5, 10**20, float("nan"), "", "x", "../x", [], [1], [[]], {}, {"a": 1})


@dataclasses.dataclass(frozen=True)
class Command:
    """A program with arguments that work; {w} in them is the attempt's copy of the workspace."""

    words: tuple
    reads: tuple = ()  # patterns of files in the workspace that it reads


CKPT = "{w}/exps/run/checkpoints/0000002.pt"
SHORT = "--batch-size 4 --sampling-steps 0 --log-every 1 --num-workers 0 --output-dir {w}/exps"
TINY = "--model DeepFlow-Ti/2 --trans-depth 2 --df-idxs 1 --learning-rate 0.001 --vae {w}/tiny-vae --data-dir {w}/data"
MAP = "--model DeepFlow-DMF-Ti/2 --trans-depth 2 --df-idxs 1 --dmf-depth 1 --data-dir {w}/data"
TEXT = "--model DeepFlow-MMDiT-Ti/2 --trans-depth 2 --df-idxs 1 --data-dir {w}/coco/data"
SAMPLE = "--num-steps 1 --per-proc-batch-size 2"
TOOL, COCO = "-m preprocessing.dataset_tools", "{w}/coco/data"
CORNERS = "--features {w}/corners.pt"
COMMANDS = {  # name: (command line, patterns of the files that it reads)
    "train": (f"train.py {TINY} {SHORT} --max-train-steps 2 --exp-name new", "data/vae-sd/*"),
    "resume": (
        f"train.py {TINY} {SHORT} --max-train-steps 3 --exp-name run --resume auto",
        "data/vae-sd/* exps/run/* exps/run/checkpoints/*",
    ),
    "train_dmf": (
        f"train_dmf.py {MAP} {SHORT} --max-train-steps 2 --exp-name map --pretrained {CKPT}",
        "exps/run/checkpoints/*",
    ),
    "train_t2i": (
        f"train_t2i.py {TEXT} {SHORT} --max-train-steps 2 --exp-name text",
        "coco/data/text/* coco/data/vae-sd/*",
    ),
    "generate": (
        f"generate.py {SAMPLE} --ckpt {CKPT} --sample-dir {{w}}/samples --num-fid-samples 3 --vae {{w}}/tiny-vae",
        "exps/run/checkpoints/* samples/* samples/*/* tiny-vae/*",
    ),
    "generate_t2i": (
        f"generate_t2i.py {SAMPLE} --ckpt {{w}}/text.pt --sample-dir {{w}}/t2i --prompts {{w}}/prompts.txt "
        "--vae {w}/coco/vae --text-encoder {w}/coco/clip",
        "text.pt prompts.txt coco/clip/* coco/vae/*",
    ),
    "convert": (
        f"{TOOL} convert --source {{w}}/source --dest {{w}}/images --resolution 16x16 --workers 1 "
        "--transform center-crop-dhariwal",
        "source/*/*",
    ),
    "encode": (
        f"{TOOL} encode --source {COCO}/images --dest {{w}}/new-vae-sd --vae {{w}}/coco/vae",
        "coco/data/images/* coco/data/images/*/* coco/vae/*",
    ),
    "pack": (f"{TOOL} pack --source {{w}}/data/vae-sd --dest {{w}}/packed", "data/vae-sd/*"),
    "captions": (
        f"{TOOL} captions --source {COCO}/images --dest {{w}}/new-text --annotations {{w}}/coco/captions.json "
        "--text-encoder {w}/coco/clip",
        "coco/captions.json coco/clip/* coco/data/images/*",
    ),
    "verify": (f"{TOOL} verify {COCO}", "coco/data/*/*"),
    "evaluator": (
        f"-m evaluations.evaluator {{w}}/ref.npz {{w}}/sampled.npz {CORNERS} --json {{w}}/results/adm.json",
        "ref.npz sampled.npz sampled.json corners.pt",
    ),
    "calc": (
        f"-m evaluations.calculate_metrics calc --images {{w}}/sampled.npz --ref {{w}}/ref.pkl --metrics= {CORNERS} "
        "--num 6 --json {w}/results/calc.json",
        "ref.pkl sampled.npz sampled.json",
    ),
    "clip_score": (
        "-m evaluations.clip_score {w}/t2i-done.npz --clip {w}/clip-score",
        "t2i-done.npz t2i-done.json clip-score/*",
    ),
    "geneval": ("-m evaluations.geneval score {w}/geneval.jsonl", "geneval.jsonl"),
    "table": ("-m evaluations.table {w}/result.json", "result.json"),
    "export": (f"-m models.export {CKPT} {{w}}/exported", "exps/run/checkpoints/*"),
    "plot": ("-m training.plot {w}/exps/run --out {w}/curves.png", "exps/run/log.jsonl exps/run/config.json"),
    "flops": ("-m evaluations.count_flops DeepFlow-Ti/2", ""),
}
COMMANDS = {name: Command(tuple(line.split()), tuple(reads.split())) for name, (line, reads) in COMMANDS.items()}
RUN = {"batch_size": 4, "max_train_steps": 2, "sampling_steps": 0, "log_every": 1, "num_workers": 0}


def make_workspace(folder):
    """Everything that the commands read, tiny."""
    folder.mkdir()
    data, vae = tiny.data_folder(folder / "data"), tiny.vae_folder(folder / "tiny-vae")
    tiny.run_train(data, folder / "exps", **RUN, vae=vae)
    write_class_folders(folder / "source", per_class=2)
    captioned.data_folder(folder / "coco")
    captioned.checkpoint(folder / "text.pt", folder / "coco")
    captioned.clip_folder(folder / "clip-score")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    captioned.run_generate(folder / "text.pt", folder / "made", "a cat", "a dog", num_steps=1)
    for suffix in ("npz", "json"):
        (made,) = (folder / "made").glob(f"*.{suffix}")
        made.rename(folder / f"t2i-done.{suffix}")
    tiny.run_generate_only(
        folder / CKPT.removeprefix("{w}/"), folder / "samples", vae=vae, num_steps=1, num_fid_samples=3
    )
    script(folder / "corners.pt")
    save_npz(folder / "ref.npz", pictures(8, 1))
    save_npz(folder / "sampled.npz", pictures(6, 0), {"step": 2})
    named = ["--data", str(folder / "ref.npz"), "--dest", str(folder / "ref.pkl"), "--features", f"{folder}/corners.pt"]
    calculate_metrics.main(["ref", "--metrics", "", *named])
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    rows = [
        {"tag": tag, "correct": k % 3 == 0, "filename": f"{k:05d}/samples/{i:04d}.png", "prompt": f"{tag} {k}"}
        for k, tag in enumerate(tags)
        for i in range(4)
    ]
    (folder / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = (
        "-m",
        "evaluations.evaluator",
        folder / "ref.npz",
        folder / "sampled.npz",
        "--features",
        folder / "corners.pt",
        "--json",
        folder / "result.json",
    )
    done = programs.run(*result)
    assert done.returncode == 0, done.stderr
    return folder


# ------------------------------------------------------------------------------------------------- the kinds of attack


def odd_flag(command, folder, chance):
    """Give one of the command's flags, or a new one, an odd value."""
    words = list(command.words)
    places = [i for i, word in enumerate(words) if word.startswith("--")]
    place = chance.choice(places) if places else len(words) - 1
    text = chance.choice(TEXTS).encode("utf-8", "replace").decode()
    words[place + 1 : place + 2] = [text]
    return words, f"{words[place]} {text!r}"


def any_flag(command, folder, chance):
    """Add a flag of the program that is not given, with an odd value."""
    cls = chance.choice(flags_of(command))
    text = chance.choice(TEXTS).encode("utf-8", "replace").decode()
    name = "--" + cls.replace("_", "-")
    return [*command.words, f"{name}={text}"], f"{name}={text!r}"


def odd_json(command, folder, chance):
    """Replace a node of a JSON file that the command reads, or break the text."""
    path = pick(command, folder, chance, lambda path: path.suffix in (".json", ".jsonl"))
    text = path.read_text()
    way = chance.randrange(6)
    if way == 0:
        damaged = text[: chance.randrange(len(text))]
    elif way == 1:
        damaged = "\ufeff" + text
    elif way == 2:
        damaged = 5000 * "[" + 5000 * "]"
    else:
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        number = chance.randrange(len(lines))
        content, value = json.loads(lines[number]), chance.choice(VALUES)
        lines[number] = json.dumps(replaced(content, value, chance))
        damaged = "\n".join(lines) + "\n"
    path.write_text(damaged)
    return command.words, f"{path.relative_to(folder)}: {damaged[:300]!r}"


def replaced(content, value, chance):
    """The JSON value with one of its nodes replaced by `value`."""
    if not content or not isinstance(content, dict | list) or chance.random() < 0.1:
        return value
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key = chance.choice(keys)
    new = replaced(content[key], value, chance)
    return {**content, key: new} if isinstance(content, dict) else [*content[:key], new, *content[key + 1 :]]


def damaged_file(command, folder, chance):
    """Cut a file, empty it, fill it with zeros or flip one of its bits."""
    path = pick(command, folder, chance, lambda path: True)
    data = bytearray(path.read_bytes())
    way = chance.choice(("cut", "emptied", "zeroed", "flipped"))
    if way == "cut":
        data = data[: chance.randrange(max(1, len(data)))]
    elif way == "emptied":
        data = b""
    elif way == "zeroed":
        data = bytes(len(data))
    elif data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return command.words, f"{path.relative_to(folder)} {way}"


def odd_entry(command, folder, chance):
    """Replace a node of a checkpoint by something of another type or shape."""
    path = pick(command, folder, chance, lambda path: path.suffix == ".pt" and path.name[:-3].isdigit())
    content = torch.load(path, weights_only=True)
    values = (*VALUES, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.full((), float("nan")))
    content = replaced(content, chance.choice(values), chance)
    torch.save(content, path)
    return command.words, f"an entry of {path.relative_to(folder)}"


def odd_path(command, folder, chance):
    """Put a folder, a pipe or a link to itself in place of a file that is read, or a file in place of a folder."""
    path = pick(command, folder, chance, lambda path: True)
    way = chance.choice(("folder", "pipe", "loop", "file"))
    if way == "file" and path.parent != folder:
        path = path.parent
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink()
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(way, lambda: path.symlink_to(path))()
    return command.words, f"{path.relative_to(folder)} is a {way}"


def stray(command, folder, chance):
    """Put files that systems and people leave behind beside the command's files."""
    path = pick(command, folder, chance, lambda path: True)
    name = chance.choice(
        (".DS_Store", "._0.png", "Thumbs.db", "0000009.pt.tmp", "x.pt", "notes.txt", ".ipynb_checkpoints")
    )
    place = path.with_name(name)
    if name == ".ipynb_checkpoints":
        place.mkdir(exist_ok=True)
        place = place / f"copy{path.suffix}"
    shutil.copyfile(path, place)
    return command.words, f"{place.relative_to(folder)}"


def small_disk(command, folder, chance):
    """Limit the size of files, as a full disk or a quota does."""
    limit = int(2 ** chance.uniform(14, 21))  # less would silence the command: its own output goes to a file
    return command.words, f"files up to {limit} bytes"


def few_files(command, folder, chance):
    """Limit the number of open files."""
    return command.words, f"{chance.choice((24, 40, 64))} open files"


def twin(command, folder, chance):
    """Start the command twice at once."""
    return command.words, "two at once"


KINDS = {"odd flag": odd_flag, "any flag": any_flag, "odd JSON": odd_json, "damaged file": damaged_file}
KINDS.update({"odd entry": odd_entry, "odd path": odd_path, "stray": stray, "small disk": small_disk})
KINDS.update({"few files": few_files, "two at once": twin})


def flags_of(command):
    """Names of all flags of a command, as its --help shows them."""
    if command not in _flags:
        words = itertools.takewhile(lambda word: "/" not in word and not word.startswith("--"), command.words)
        shown = programs.run(*words, "--help").stdout
        _flags[command] = sorted(set(re.findall(r"--([a-z][a-z0-9-]+)", shown)) - {"help"})
    return _flags[command]


_flags = {}


def pick(command, folder, chance, wanted):
    """One of the files that the command reads; raises Skip if it reads none of that kind."""
    files = sorted(
        {path for pattern in command.reads for path in folder.glob(pattern) if path.is_file() and wanted(path)}
    )
    if not files:
        raise Skip
    return chance.choice(files)


class Skip(Exception):
    """The kind of attack does not fit the command."""


# --------------------------------------------------------------------------------------------------- attempt, verdict


def start(words, kind, detail):
    """Start a command under the limits of this kind; returns the Program."""
    if kind not in ("small disk", "few files"):
        return programs.start(*words)
    number = int(re.search(r"\d+", detail)[0])
    which = resource.RLIMIT_FSIZE if kind == "small disk" else resource.RLIMIT_NOFILE
    return programs.start(*words, limits=((which, number),))


def verdict(done, command):
    """What is wrong with how a program ended, or None."""
    code, error = done.returncode, done.stderr
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    if "Traceback (most recent call last)" in error + done.stdout:
        return "traceback: " + error.strip().splitlines()[-1][:200]
    if code == 0 or (code == 1 and "verify" in command.words):
        return None
    last = error.strip().splitlines()[-1] if error.strip() else ""
    if code != 2 or "error: " not in last:
        return f"exit code {code}: {last[:200]}"
    return None


@contextlib.contextmanager
def copy_of(workspace):
    """Put a copy where the workspace was made, since its files refer to one another by path."""
    folder = Path(shutil.copytree(workspace, workspace.with_name("w"), symlinks=True))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def attempt(seed, workspace, only=None):
    """(kind, command, what was done, what went wrong or None) of the attack `seed`; None if it does not fit."""
    chance = random.Random(seed)
    kind, name = chance.choice([k for k in KINDS if only in (None, k)]), chance.choice(list(COMMANDS))
    command = COMMANDS[name]
    with copy_of(workspace) as folder:
        here = dataclasses.replace(command, words=tuple(word.replace("{w}", str(folder)) for word in command.words))
        try:
            words, detail = KINDS[kind](here, folder, chance)
            started = [start(words, kind, detail) for _ in range(2 if kind == "two at once" else 1)]
        except Skip:
            return None
        try:
            ends = [
                programs.Done(
                    p.wait(TIME_LIMIT), p.stdout.read_text(errors="replace"), p.stderr.read_text(errors="replace")
                )
                for p in started
            ]
        except TimeoutError:
            return kind, name, detail, "no end"
        faults = [fault for fault in (verdict(done, here) for done in ends) if fault]
        if not faults and kind == "two at once" and all(done.returncode for done in ends):
            faults = ["both refused"]
        return kind, name, detail, faults[0] if faults else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=100)
    parser.add_argument("--kind", choices=KINDS)
    args = parser.parse_args()
    failed = campaign(args.seed, args.attempts, args.kind)
    sys.exit(bool(failed))


def check_commands(workspace):
    """Every command must work when it is not disturbed."""
    for name, command in COMMANDS.items():
        with copy_of(workspace) as folder:
            done = programs.run(*(word.replace("{w}", str(folder)) for word in command.words))
            assert done.returncode == 0, f"{name}: {done.stderr[-500:]}"


def campaign(seed, attempts, only=None):
    """Run the attacks and print the table; returns descriptions of those that were not survived."""
    tried, survived, failed = collections.Counter(), collections.Counter(), []
    with tempfile.TemporaryDirectory(prefix="attack-") as place, open(os.devnull, "w") as quiet:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            workspace = make_workspace(Path(place) / "w").rename(Path(place) / "workspace")
        check_commands(workspace)
        for number in range(seed * 1_000_000, seed * 1_000_000 + attempts):
            if (result := attempt(number, workspace, only)) is None:
                continue
            kind, name, detail, fault = result
            tried[kind] += 1
            survived[kind] += fault is None
            if fault:
                failed.append(f"{number}: {kind}, {name}, {detail[:300]}: {fault}")
                print(failed[-1], flush=True)
    for kind in tried:
        print(f"{kind:14} tried {tried[kind]:4}, survived {survived[kind]:4}")
    return failed


if __name__ == "__main__":
    main()

"""The programs that tests/attack.py attacks: command lines that work, what they read, and what they make."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import captioned
import programs
import small_disk
import tiny
import torch
from data_helpers import write_class_folders, write_images
from evaluation_helpers import pictures, save_npz, script

from digits.data import load_digits_split, upsample
from evaluations import calculate_metrics


@dataclasses.dataclass(frozen=True)
class Command:
    """A program with arguments that work; {w} in them is the attempt's copy of the workspace."""

    words: tuple
    reads: tuple  # patterns of files in the workspace that it reads

    def at(self, folder):
        """The command for a workspace in that folder."""
        return dataclasses.replace(self, words=tuple(word.replace("{w}", str(folder)) for word in self.words))


CKPT = "{w}/exps/run/checkpoints/0000002.pt"
SHORT = "--batch-size 4 --sampling-steps 0 --log-every 1 --num-workers 0 --output-dir {w}/exps --resume auto"
TINY = "--model DeepFlow-Ti/2 --trans-depth 2 --df-idxs 1 --learning-rate 0.001 --vae {w}/tiny-vae --data-dir {w}/data"
MAP = "--model DeepFlow-DMF-Ti/2 --trans-depth 2 --df-idxs 1 --dmf-depth 1 --data-dir {w}/data"
TEXT = "--model DeepFlow-MMDiT-Ti/2 --trans-depth 2 --df-idxs 1 --data-dir {w}/coco/data"
SAMPLE = "--num-steps 1 --per-proc-batch-size 2"
TOOL, COCO = "-m preprocessing.dataset_tools", "{w}/coco/data"
CROP = "--resolution 16x16 --transform center-crop-dhariwal --workers 1"
CORNERS = "--features {w}/corners.pt"
COMMANDS = {  # name: (command line, patterns of the files that it reads)
    "train": (f"train.py {TINY} {SHORT} --max-train-steps 2 --exp-name new", "data/vae-sd/*"),
    "resume": (
        f"train.py {TINY} {SHORT} --max-train-steps 3 --exp-name run",
        "data/vae-sd/* exps/run/* exps/run/checkpoints/*",
    ),
    "init_from": (
        f"train.py {TINY} {SHORT} --max-train-steps 2 --exp-name started --init-from {CKPT} --new-classes",
        "exps/run/checkpoints/*",
    ),
    "train_dmf": (
        f"train_dmf.py {MAP} {SHORT} --max-train-steps 2 --exp-name map --init-from {CKPT}",
        "exps/run/checkpoints/*",
    ),
    "train_t2i": (
        f"train_t2i.py {TEXT} {SHORT} --max-train-steps 2 --exp-name text",
        "coco/data/text/* coco/data/vae-sd/*",
    ),
    "generate": (
        f"generate.py {SAMPLE} --ckpt {CKPT} --sample-dir {{w}}/samples --num-fid-samples 4 --vae {{w}}/tiny-vae",
        "exps/run/checkpoints/* samples/* samples/*/* tiny-vae/*",
    ),
    "generate_folder": (
        f"generate.py {SAMPLE} --ckpt {{w}}/exported --sample-dir {{w}}/more --num-fid-samples 3 --vae {{w}}/tiny-vae "
        "--labels {w}/labels.txt --format npz",
        "exported/* labels.txt",
    ),
    "generate_t2i": (
        f"generate_t2i.py {SAMPLE} --ckpt {{w}}/text.pt --sample-dir {{w}}/t2i --prompts {{w}}/prompts.txt "
        "--vae {w}/coco/vae --text-encoder {w}/coco/clip",
        "text.pt prompts.txt coco/clip/* coco/vae/*",
    ),
    "convert": (f"{TOOL} convert --source {{w}}/source --dest {{w}}/images {CROP}", "source/*/*"),
    "convert_zip": (f"{TOOL} convert --source {{w}}/source.zip --dest {{w}}/images.zip {CROP}", "source.zip"),
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
    "info": (f"{TOOL} info {COCO} --grid {{w}}/grid.png --vae {{w}}/coco/vae", "coco/data/vae-sd/*"),
    "evaluator": (
        f"-m evaluations.evaluator {{w}}/ref.npz {{w}}/sampled.npz {CORNERS} --json {{w}}/results/adm.json",
        "ref.npz sampled.npz sampled.json corners.pt",
    ),
    "calc": (
        f"-m evaluations.calculate_metrics calc --images {{w}}/sampled.npz --ref {{w}}/ref.pkl --metrics= {CORNERS} "
        "--num 6 --json {w}/results/calc.json",
        "ref.pkl sampled.npz sampled.json",
    ),
    "ref": (
        f"-m evaluations.calculate_metrics ref --data {{w}}/source --dest {{w}}/new.pkl --metrics= {CORNERS}",
        "source/*/*",
    ),
    "clip_score": (
        "-m evaluations.clip_score {w}/t2i-done.npz --clip {w}/clip-score --json {w}/results/clip.json",
        "t2i-done.npz t2i-done.json clip-score/*",
    ),
    "geneval": ("-m evaluations.geneval score {w}/geneval.jsonl", "geneval.jsonl"),
    "table": ("-m evaluations.table {w}/result.json", "result.json"),
    "distance": (
        f"-m evaluations.feature_distance --ckpt {CKPT} --num-samples 2 --num-steps 2 --out {{w}}/distance.json",
        "exps/run/checkpoints/*",
    ),
    "probe": (
        f"-m evaluations.probe --ckpt {CKPT} --data-dir {{w}}/data --holdout 0.4 --times 0.5 --out {{w}}/results/probe",
        "exps/run/checkpoints/* data/vae-sd/*",
    ),
    "export": (f"-m models.export {CKPT} {{w}}/new-export", "exps/run/checkpoints/*"),
    "plot": ("-m training.plot {w}/exps/run --out {w}/curves.png", "exps/run/log.jsonl exps/run/config.json"),
    "flops": ("-m evaluations.count_flops DeepFlow-Ti/2", ""),
    "digits": ("-m digits.data --dest {w}/digits", ""),
    "digits_vae": ("-m digits.train_vae --dest {w}/new-vae --steps 1 --batch-size 2", ""),
    "pictures_vae": (
        "-m digits.train_vae --data {w}/cifar --dest {w}/new-vae --steps 1 --batch-size 2",
        "cifar/*/*/*",
    ),
    "judge": (
        "-m studies.train_judge --data {w}/cifar --dest {w}/new-judge --epochs 1 --batch-size 10",
        "cifar/*/*/*",
    ),
    "judged": (
        "-m studies.report --samples {w}/digits.npz --data {w}/cifar --judge {w}/judge --out {w}/results/judged.json",
        "digits.npz digits.json cifar/test/*/*",
    ),
    "digits_captions": ("-m digits.captions --digits {w}/drawn --dest {w}/digits-text", "drawn/*/*"),
    "digits_report": (
        "-m digits.report --samples {w}/digits.npz --out {w}/results/report.json --grid {w}/digits.png",
        "digits.npz digits.json",
    ),
    "digits_rows": (
        "-m digits.report --out {w}/results/rows.json --samples a={w}/digits.npz b={w}/digits.npz",
        "digits.npz digits.json",
    ),
    "digits_gallery": ("-m digits.gallery --out {w}/gallery --max-steps 4", ""),
}
COMMANDS = {name: Command(tuple(line.split()), tuple(reads.split())) for name, (line, reads) in COMMANDS.items()}
RUN = {"batch_size": 4, "max_train_steps": 2, "sampling_steps": 0, "log_every": 1, "num_workers": 0}


# ------------------------------------------------------------------------------------------------------ what is read


def make_workspace(folder):
    """Everything that the commands read, tiny."""
    folder.mkdir()
    vae, ckpt = tiny.vae_folder(folder / "tiny-vae"), Path(CKPT.replace("{w}", str(folder)))
    tiny.run_train(tiny.data_folder(folder / "data"), folder / "exps", **RUN, vae=vae)
    tiny.run_generate_only(ckpt, folder / "samples", vae=vae, num_steps=1, num_fid_samples=3)
    made = programs.run("-m", "models.export", ckpt, folder / "exported")
    assert made.returncode == 0, made.stderr
    (folder / "labels.txt").write_text("2\n0\n")
    write_class_folders(folder / "source", per_class=2)
    with zipfile.ZipFile(folder / "source.zip", "w") as archive:
        for path in sorted((folder / "source").rglob("*.*")):
            archive.write(path, path.relative_to(folder / "source"))
    make_captioned(folder)
    make_results(folder)
    return folder


def make_captioned(folder):
    """Captioned data, a model of them, and images of prompts."""
    captioned.data_folder(folder / "coco")
    captioned.checkpoint(folder / "text.pt", folder / "coco")
    captioned.clip_folder(folder / "clip-score")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    captioned.run_generate(folder / "text.pt", folder / "made", "a cat", "a dog", num_steps=1)
    for suffix in ("npz", "json"):
        (made,) = (folder / "made").glob(f"*.{suffix}")
        made.rename(folder / f"t2i-done.{suffix}")


def make_results(folder):
    """References, images to measure, and results."""
    features = script(folder / "corners.pt")
    reference = save_npz(folder / "ref.npz", pictures(8, 1))
    sampled = save_npz(folder / "sampled.npz", pictures(6, 0), {"step": 2})
    words = ["ref", "--metrics", "", "--data", reference, "--dest", f"{folder}/ref.pkl", "--features", features]
    calculate_metrics.main(words)
    words = [reference, sampled, "--features", features, "--json", folder / "result.json"]
    made = programs.run("-m", "evaluations.evaluator", *words)
    assert made.returncode == 0, made.stderr
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    rows = [
        {"tag": tag, "correct": k % 3 == 0, "filename": f"{k:05d}/samples/{i:04d}.png", "prompt": f"{tag} {k}"}
        for k, tag in enumerate(tags)
        for i in range(4)
    ]
    (folder / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_images(folder / "drawn", [f"{digit}/0.png" for digit in range(10)])
    write_images(folder / "cifar", [f"{split}/{c}/0.png" for split in ("train", "test") for c in range(10)], side=32)
    words = ["--data", folder / "cifar", "--dest", folder / "judge", "--epochs", "1", "--batch-size", "5"]
    assert programs.run("-m", "studies.train_judge", *words).returncode == 0
    digits = load_digits_split()[1]
    save_npz(folder / "digits.npz", upsample(digits.images[:40]), {"labels": digits.labels[:40].tolist()})


@contextlib.contextmanager
def copy_of(workspace, disks):
    """Put a copy where the workspace was made, since its files refer to one another by path; disks: on one of its own.

    In it, the commands run in the folder `here` and put temporary files into `tmp`.
    """
    folder = workspace.with_name("w é")
    with small_disk.mounted(folder) if disks else contextlib.nullcontext():
        shutil.copytree(workspace, folder, symlinks=True, dirs_exist_ok=True)
        for name in ("here", "tmp"):
            (folder / name).mkdir()
        try:
            yield folder
        finally:
            if not disks:
                shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------ what is made

COMPARED = (".npy", ".npz", ".png", ".pkl", ".zip", ".bin", ".safetensors", ".tmp", ".partial")


def results(folder, printed):
    """{name: digest} of what must not depend on time and place: files of numbers and pictures, and what is printed.

    Of checkpoints and results the numbers; of what a command says, only that of those which write no file. Temporary
    files count, as none may be left.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in COMPARED and path.is_file():
            found[str(path.relative_to(folder))] = digest(path.read_bytes())
        elif path.suffix == ".pt" and path.is_file():
            found[str(path.relative_to(folder))] = digest(*numbers(path))
        elif path.suffix == ".json" and path.parent.name == "results":
            content = json.loads(path.read_text())
            found[str(path.relative_to(folder))] = digest(json.dumps(content.get("metrics", content)).encode())
    return found | ({"output": digest(printed.encode())} if printed else {})


def digest(*parts):
    value = hashlib.sha256()
    for part in parts:
        value.update(part)
    return value.hexdigest()


def numbers(path):
    """The bytes of the weights, averages and moments of a checkpoint; of a file that is none, its own."""
    if path.name == "corners.pt":  # TorchScript
        return [path.read_bytes()]
    try:
        content = torch.load(path, weights_only=True)
        parts = {name: content[name] for name in ("model", "ema", "opt") if name in content}
    except Exception:
        return [path.read_bytes()]
    return list(tensors(parts))


def tensors(content):
    """The bytes of all tensors in dicts and lists."""
    if isinstance(content, torch.Tensor):
        yield content.numpy().tobytes()
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)


PRINTS = ("verify", "geneval", "table", "flops")  # commands whose result is what they say


def environment(folder):
    """Of every attempt: nothing outside its folder is looked up."""
    apart = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg"}
    return {**apart, "HF_HOME": str(folder / "hub"), "TMPDIR": str(folder / "tmp")}

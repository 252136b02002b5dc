"""Sample a checkpoint and measure the samples by running other programs, for evaluations.sweep and .watch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

from common.errors import InputError, note
from common.flags import IMAGES, ROOT, WORKERS, flag, parse_flags, required, shown, words_of
from evaluations.metrics.results import NetworkFlags, label

DIGITS = "digits"  # value of --ref


@dataclasses.dataclass(kw_only=True)
class MeasuringFlags(NetworkFlags):
    """Number of samples and their reference; a subclass adds `out`, the folder for results."""

    ref: str = required("reference file as for evaluations.evaluator, or the word digits", metavar="NPZ")
    num_samples: int = flag(5000, "samples per measurement", range=IMAGES, group="sampling", name="--num-fid-samples")
    processes: int = flag(1, "processes for sampling and measuring", range=WORKERS, group="precision and speed")
    other_size: bool = flag(False, "as in evaluations.evaluator", group="distances")

    @property
    def distance(self):
        """Name of the Fréchet distance among the metrics."""
        if self.ref == DIGITS:
            return "Fréchet distance of digits"
        return f"fd_{self.extractor}" if self.features else "fid"

    def label(self, metric):
        """A metric's name as the evaluator prints it."""
        return label(metric, self.extractor)


def split(words):
    """(words before `--`, words after it, which go to generate.py)."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def check_generate(given, ckpt, own=()):
    """Raise InputError if a flag of generate*.py given after `--` is one that the calling program sets itself.

    given: those flags, parsed; own: further names that it sets.
    """
    plain = {field.name: field.default for field in dataclasses.fields(given)} | {"ckpt": ckpt}
    for name in ("ckpt", "num_fid_samples", "sample_dir", "grid", "decode", *own):
        if getattr(given, name) != plain[name]:
            flag = words_of(shown(name), getattr(given, name))[0]
            raise InputError(f"{flag} is not allowed after --: this program decides it; leave it out")
    if given.format == "png":
        raise InputError("--format png after -- leaves no npz to measure; leave it out")


def run_python(processes, *command):
    """Run a program of the repository, under torchrun if there are several processes. Raises InputError if it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = map(str, [*(torchrun if processes > 1 else []), *command])
    if code := subprocess.run([sys.executable, *words], check=False).returncode:
        name = command[1] if command[0] == "-m" else command[0]
        raise InputError(f"{name} failed with exit code {code}; see its output above")


def measuring(args, samples):
    """Command-line arguments of the evaluator."""
    words = [args.ref, str(samples)]
    for name in ("inception_weights", "features"):
        words += [shown(name), getattr(args, name)] if getattr(args, name) else []
    return words + (["--other-size"] if args.other_size else [])


def make_result(name, ckpt, args, program, words):
    """Path of the result `name` in --out; if it is missing, run `program` with these words and measure the samples."""
    path, folder = Path(args.out, f"{name}.json"), Path(args.out, "samples", name)
    if not path.exists():
        note(f"sampling {name}")
        flags = ["--ckpt", ckpt, "--sample-dir", folder, "--num-fid-samples", args.num_samples]
        run_python(args.processes, ROOT / program, *flags, *words)
        npz = max(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)  # which generate*.py touches at the end
        if args.ref == DIGITS:
            run_python(1, "-m", "digits.report", "--samples", npz, "--out", path)
        else:
            run_python(args.processes, "-m", "evaluations.evaluator", *measuring(args, npz), "--json", path)
    return path


def check_reference(args):
    """Raise InputError, before anything is sampled, for a reference or network that cannot be used."""
    from common.processes import Processes
    from evaluations.evaluator import EvaluatorFlags, check_inputs

    if args.ref != DIGITS:
        check_inputs(parse_flags(EvaluatorFlags, measuring(args, "samples")), Processes.join("cpu"))

"""Speed of data preparation and loading; prints one Markdown table, ratios and whether the targets are met.

    python -m benchmarks.data --work /fast/disk/scratch

Needs 4 GB of disk. All in one run, so that the ratios compare like with like. "Cold" means that the files were dropped
from the page cache first (a virtual disk may still be cached by its host).
"""

import dataclasses
import functools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common.errors import exit_on_input_error
from common.flags import Range, flag, parse_flags
from common.progress import Progress
from common.versions import versions
from dataset import open_dataset
from preprocessing.convert import convert
from preprocessing.encode import encode, latent_name
from preprocessing.options import ConvertFlags, EncodeFlags, PackFlags
from preprocessing.pack import pack
from training.loader import LatentLoader, SeekableSampler

ROOT = Path(__file__).resolve().parent.parent
SHAPE, BATCH, IMAGENET = (8, 32, 32), 256, 1_281_167


def rate(count, function):
    """Images per second of a function that handles `count` images."""
    start = time.perf_counter()
    function()
    return count / (time.perf_counter() - start)


def write_photographs(folder, count):
    """JPEGs of ImageNet's usual size, smooth noise in 10 class folders."""
    rng = np.random.default_rng(0)
    for k in Progress(range(count), desc="photographs"):
        path = folder / f"n{k % 10:02d}/{k}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def measure_convert(work, count):
    """{row: images/s} of convert with 1 and 2 workers, to 256²."""
    write_photographs(work / "photographs", count)

    def run(workers):
        dest = work / f"images-{workers}"
        convert(ConvertFlags(work / "photographs", dest, (256, 256), "center-crop-dhariwal", workers=workers))

    return {f"convert 500x375 → 256², {n} worker{'s' * (n > 1)}": rate(count, lambda n=n: run(n)) for n in (1, 2)}


def measure_encode(work, count):
    """{row: images/s} of encode with the tiny VAE at 64², one by one and batched, fp32 on the CPU."""
    convert(ConvertFlags(work / "photographs", work / "small", (64, 64), "center-crop-dhariwal", max_images=count))
    vae = ROOT / "assets/tiny-vae"
    encode(EncodeFlags(work / "small", work / "warm-up", vae, batch_size=16, device="cpu"))
    rows = {}
    for name, batch_size in (("one by one", 1), ("batches of 16", 16)):
        dest = work / f"vae-{batch_size}"
        options = EncodeFlags(work / "small", dest, vae, batch_size=batch_size, packed=True, device="cpu")
        rows[f"encode 64², tiny VAE, {name}"] = rate(count, functools.partial(encode, options))
    return rows


def write_latents(folder, count):
    """The published layout: one .npy per image."""
    rng, labels = np.random.default_rng(0), []
    for i in Progress(range(count), desc="latents"):
        path = folder / latent_name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.abs(rng.standard_normal(SHAPE, dtype=np.float32)))
        labels.append([latent_name(i), i % 1000])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


class OneFilePerImage(Dataset):
    """How published training reads: one np.load per item, batches put together by the DataLoader."""

    def __init__(self, folder):
        self.folder = folder
        self.items = json.loads((folder / "dataset.json").read_text())["labels"]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        name, label = self.items[index]
        return torch.from_numpy(np.load(self.folder / name)), torch.tensor(label)


def drop_from_cache(folder):
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loaders(work):
    """{name: (folder, function that makes a loader of one epoch)}; as in training, a loader serves every epoch."""

    def ours(folder):
        data = open_dataset(folder, data_vae="ema", num_classes=1000)
        sampler = SeekableSampler(len(data), BATCH, seed=0)
        return LatentLoader(data, sampler, stop_step=sampler.steps_per_epoch)

    def ordinary(workers):
        data = OneFilePerImage(work / "latents")
        return DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)

    return {
        "packed": (work / "packed", lambda: ours(work / "packed")),
        "packed, 13 shards": (work / "sharded", lambda: ours(work / "sharded")),
        "folder": (work / "latents", lambda: ours(work / "latents")),
        "one file per image, DataLoader, 0 workers": (work / "latents", lambda: ordinary(0)),
        "one file per image, DataLoader, 2 workers": (work / "latents", lambda: ordinary(2)),
    }


def measure_loaders(work, count, repeats):
    """{name: (cold images/s, median warm images/s, seconds to the first batch)} over one epoch each."""
    write_latents(work / "latents", count)
    pack(PackFlags(work / "latents", work / "packed", vae="ema", num_classes=1000))
    pack(PackFlags(work / "latents", work / "sharded", vae="ema", num_classes=1000, shard_size=count // 12))
    rows = {}
    for name, (folder, make) in loaders(work).items():
        drop_from_cache(folder)
        speeds, first, loader = [], None, None
        for _ in range(repeats + 1):
            start, seen = time.perf_counter(), 0
            loader = loader or make()
            for batch in loader:
                first = first or time.perf_counter() - start
                seen += len(batch[0] if isinstance(batch, list) else batch.moments)
            speeds.append(seen / (time.perf_counter() - start))
            print(f"{name}: {speeds[-1]:.0f} images/s", file=sys.stderr)
        rows[name] = (speeds[0], statistics.median(speeds[1:]), first)
    return rows


START = """
import json, time
from dataset import open_dataset
from training.loader import LatentLoader, SeekableSampler
anonymous = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("RssAnon")).split()[1]) / 1024
before, start = anonymous(), time.perf_counter()
data = open_dataset({folder!r})
opened = time.perf_counter() - start
loader = iter(LatentLoader(data, SeekableSampler(len(data), {batch}, seed=0)))
next(loader)
first = time.perf_counter() - start
for _ in range(200):
    next(loader)
print(json.dumps([opened, first, anonymous() - before]))
"""


def measure_start(work):
    """Seconds to open 1.28M packed entries, seconds to the first batch, and MB of own memory, in a fresh process."""
    folder, shard = work / "imagenet", 65536
    folder.mkdir()
    shards = []
    for number, start in enumerate(range(0, IMAGENET, shard)):
        shards.append({"file": f"rows-{number:05d}.bin", "count": min(shard, IMAGENET - start), "sha256": ""})
        with open(folder / shards[-1]["file"], "wb") as file:
            file.truncate(shards[-1]["count"] * 2 * int(np.prod(SHAPE)))  # sparse: takes no space
    np.save(folder / "labels.npy", np.arange(IMAGENET) % 1000)
    (folder / "names.txt").write_bytes(b"%-24s\n" % b"00000/img00000000.png" * IMAGENET)
    manifest = json.loads((work / "packed/manifest.json").read_text())
    manifest |= {"count": IMAGENET, "shard_size": shard, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code = START.format(folder=str(folder), batch=BATCH)
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


LISTING = """
import resource
from latents.names import label_json, pack_names, parse_label_list
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
names = sorted(f"n{{k % 1000:08d}}/n{{k % 1000:08d}}_{{k}}.JPEG" for k in range({count}))
pack_names(names)
again, labels = parse_label_list(label_json(names, [k % 1000 for k in range({count})]), "dataset.json")
assert again == names
print(peak() - before)
"""


def measure_listing():
    """Peak MB of memory while 1.28M names and labels are sorted, written and read again, in a fresh process."""
    code = LISTING.format(count=IMAGENET)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def processor():
    """Name of the processor, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(preparation, loading, start, listing, count):
    """Markdown: where it was measured, the tables, the targets."""
    packages = versions("torch", "diffusers")
    threads = f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads"
    load = os.getloadavg()[0]
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {threads}, load average {load:.1f} at the end; "
        + ", ".join(f"{name} {text}" for name, text in packages.items()),
        "",
        "| preparation | images/s |",
        "|---|---|",
        *(f"| {name} | {speed:.1f} |" for name, speed in preparation.items()),
        "",
        f"| loader, {count} moments of {'×'.join(map(str, SHAPE))}, batches of {BATCH} | cold images/s | warm images/s "
        "| first batch, cold |",
        "|---|---|---|---|",
        *(f"| {name} | {cold:,.0f} | {warm:,.0f} | {first:.3f} s |" for name, (cold, warm, first) in loading.items()),
        "",
        "| target | measured |",
        "|---|---|",
    ]
    opened, first, memory = start
    ordinary = max(warm for name, (_, warm, _) in loading.items() if "DataLoader" in name)
    ratio = loading["packed"][1] / ordinary
    targets = [
        ("packed at least 20 times one file per image (the better DataLoader), warm", f"{ratio:.1f}", ratio >= 20),
        ("packed at least 100,000 images/s, warm", f"{loading['packed'][1]:,.0f}", loading["packed"][1] >= 100_000),
        (f"{IMAGENET:,} entries: opened in under 1 s", f"{opened:.3f} s (first batch {first:.3f} s)", opened < 1),
        ("memory under 300 MB beyond the map", f"{memory:.0f} MB", memory < 300),
        (f"names and labels of {IMAGENET:,} images listed in under 2 GB", f"{listing:.0f} MB", listing < 2000),
    ]
    lines += [f"| {name} | {text}{'' if met else ' — NOT MET'} |" for name, text, met in targets]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return "\n".join([*lines, "", f"Peak memory of the benchmark itself: {peak:.0f} MB, files in the map included."])


@dataclasses.dataclass(kw_only=True)
class BenchmarkFlags:
    """What is measured, and where."""

    work: str | None = flag(None, "scratch folder; default: the system's", str, group="output")
    count: int = flag(50_000, "moments for the loaders", range=Range(low=1), group="data")
    images: int = flag(400, "images to convert and encode", range=Range(low=1), group="data")
    repeats: int = flag(3, "warm epochs, of which the median counts", range=Range(low=1), group="precision and speed")


def main():
    """Measure everything, print the report."""
    options = parse_flags(BenchmarkFlags, description=__doc__)
    torch.set_num_threads(min(2, os.cpu_count()))
    work = Path(tempfile.mkdtemp(prefix="benchmark-", dir=options.work))
    try:
        preparation = {**measure_convert(work, options.images), **measure_encode(work, options.images)}
        loading = measure_loaders(work, options.count, options.repeats)
        print(report(preparation, loading, measure_start(work), measure_listing(), options.count))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

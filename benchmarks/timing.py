"""What the benchmarks share: interleaved timing, the machine's matrix-product rate, its description, tables."""

import ctypes
import platform
import statistics
import sys
import time

import torch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run, device):
    """Wall time of one call, seconds, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def keep_freed_memory():
    """Let glibc keep what is freed, as GPU allocators do.

    Otherwise models that are run in turns pay for fresh pages in every step, the larger the more.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_max, 0)
        ctypes.CDLL(None).mallopt(m_trim_threshold, 2**31 - 1)


def interleaved_times(runs, repeats, device):
    """{name: seconds of every repeat} of {name: callable}, called in turns, so that a busy moment hits all alike.

    Each is called twice before, which compiles and fills caches.
    """
    if device.type == "cpu":
        keep_freed_memory()
    for run in runs.values():
        run()
        run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds_of(run, device))
    return times


def medians_of(times):
    """{name: median seconds} of what `interleaved_times` returns."""
    return {name: statistics.median(values) for name, values in times.items()}


def interleaved_medians(runs, repeats, device):
    """{name: median seconds} of {name: callable}, called in turns as by `interleaved_times`."""
    return medians_of(interleaved_times(runs, repeats, device))


def median_ratio(times, name, other):
    """Median over the repeats of name's time to other's in the same repeat: steadier than a ratio of medians."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def matmul_rate(device, dtype, size=None, repeats=5):
    """FLOP/s of a square matrix product on this machine, the best of some: what a model's rate is compared with."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    for _ in range(2):
        torch.mm(a, b, out=out)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats))


def describe_machine(device):
    """One line: device, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    return f"{name}, {threads}torch {torch.__version__}, Python {platform.python_version()}"


def print_table(header, rows):
    """Print a markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

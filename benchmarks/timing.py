"""What the benchmarks share: the device, interleaved timing, memory, the rate of matrix products, tables."""

import ctypes
import gc
import importlib.util
import platform
import statistics
import sys
import time

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def installed(package):
    """Whether a package is installed; only some rows need it, and a GPU machine may lack it."""
    return importlib.util.find_spec(package) is not None


def synchronize():
    """Wait for what the device has been given to do."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


def seconds_of(run):
    """Wall time of one call, seconds, the device's queue included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def keep_freed_memory():
    """Let glibc keep what is freed, as GPU allocators do.

    Otherwise models that are run in turns pay for fresh pages in every step, the larger the more.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_max, 0)
        ctypes.CDLL(None).mallopt(m_trim_threshold, 2**31 - 1)


def interleaved_times(runs, repeats):
    """{name: seconds of every repeat} of {name: callable}, called in turns, so that a busy moment hits all alike.

    Each is called twice before, which compiles and fills caches.
    """
    if not ON_GPU:
        keep_freed_memory()
    for run in runs.values():
        run()
        run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    return times


def medians_of(times):
    """{name: median seconds} of what `interleaved_times` returns."""
    return {name: statistics.median(values) for name, values in times.items()}


def interleaved_medians(runs, repeats):
    """{name: median seconds} of {name: callable}, called in turns as by `interleaved_times`."""
    return medians_of(interleaved_times(runs, repeats))


def median_ratio(times, name, other):
    """Median over the repeats of name's time to other's in the same repeat: steadier than a ratio of medians."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def free():
    """Free the memory of networks that are no longer referenced, and drop what was compiled for them."""
    torch.compiler.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def peak_gpu_memory(run):
    """Peak GPU memory during a call, MB."""
    torch.cuda.reset_peak_memory_stats(DEVICE)
    run()
    return torch.cuda.max_memory_allocated(DEVICE) / 1e6


def matmul_rate(dtype, repeats=5):
    """FLOP/s of a square matrix product on this machine, the best of some: what a model's rate is compared with."""
    size = 8192 if ON_GPU else 2048
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=DEVICE, dtype=dtype)
    for _ in range(2):
        torch.mm(a, b, out=out)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b, out=out)) for _ in range(repeats))


def describe_machine():
    """One line: device, threads, versions."""
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else platform.processor() or platform.machine()
    threads = "" if ON_GPU else f"{torch.get_num_threads()} threads, "
    return f"{name}, {threads}torch {torch.__version__}, Python {platform.python_version()}"


def print_table(header, rows):
    """Print a markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

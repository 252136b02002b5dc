"""One process among those of a launch: its device, and how it leaves."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from common.errors import TURN, InputError
from common.processes import Processes, device_of_process


def two_gpus(monkeypatch, local):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    return chosen


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = two_gpus(monkeypatch, local=1)
    assert device_of_process() == torch.device("cuda", 1)
    assert chosen == [1]
    assert device_of_process("cpu") == torch.device("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    two_gpus(monkeypatch, local=2)
    with pytest.raises(InputError, match=r"process 3 of this machine has no GPU \(2 visible\); start at most 2"):
        device_of_process()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"has no GPU \(0 visible\); use the CPU"):
        device_of_process("cuda")


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_waits_for_no_other_process(monkeypatch, world):
    """NCCL's group ends only when all processes end it; the others may be waiting for this one."""
    ended = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(world))
    with pytest.raises(InputError, match="mistake"), Processes(0, world, torch.device("cpu"), None):
        raise InputError("a mistake")
    assert ended == []
    with Processes(0, world, torch.device("cpu"), None):
        pass  # without an error
    assert ended == [2] * (world > 1)


def test_a_process_of_another_machine_that_failed_is_noticed(monkeypatch):
    store = dist.HashStore()
    first, second = (Processes(rank, 2, torch.device("cpu"), store) for rank in (0, 1))
    first.check_others()
    with pytest.raises(OSError), second:
        raise OSError("no space left")
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(InputError, match="another process failed"):
        first.check_others()
    assert sum(waited) > TURN  # the one that failed is to speak first


@pytest.mark.parametrize("way", ["left", "failed"])
def test_the_first_process_leaves_last(way):
    """It may keep the store, which slower processes still read."""
    store, order = dist.HashStore(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: order.append("first"))

        def leave_late():
            time.sleep(0.3)
            order.append("second")
            store.add(way, 1)

        other = threading.Thread(target=leave_late)
        other.start()
        with Processes(0, 2, torch.device("cpu"), store):
            pass
        other.join()
    assert order == ["second", "first"]

"""Disks in memory, of a given size or read-only, in mounts that nobody but this process and its children see."""

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def allow():
    """Give this process mounts of its own; False where that is not permitted. Before any thread starts."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWNS | CLONE_NEWUSER):
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    except OSError:
        return False
    return not _mount("-t", "tmpfs", "none", "/mnt", check=False)


@contextlib.contextmanager
def mounted(folder):
    """An empty disk in memory at a new folder, without a limit."""
    folder.mkdir()
    _mount("-t", "tmpfs", "none", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def set_room(folder, room):
    """Leave `room` bytes of the disk."""
    disk = os.statvfs(folder)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    _mount("-o", f"remount,rw,size={used + room}", folder)


def set_read_only(folder):
    _mount("-o", "remount,ro", folder)


def _mount(*options, check=True):
    return subprocess.run(["mount", *options], check=check, stderr=subprocess.DEVNULL).returncode

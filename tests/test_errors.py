"""How a command ends: one line and an exit code for user and system errors, a traceback for our own bugs."""

import errno
import os
import resource
import signal
import warnings

import programs
import pytest
import tiny
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from common.errors import InputError, exit_on_input_error, system_fault, unreadable
from latents.rows import read_array
from models.checkpoints import read_file
from sampling.stores import PngFiles


def end_of(error, capsys):
    """(exit code, printed text) of a command that raises the error."""
    with pytest.raises(SystemExit) as caught, exit_on_input_error():
        raise error
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x", "a.pt"), ["a.pt: No space left", "free space"]),
        (OSError(errno.EDQUOT, "x", "a.pt"), ["a.pt", "quota"]),
        (OSError(errno.EFBIG, "x", "a.pt"), ["a.pt: File too large", "ulimit -f"]),
        (OSError(errno.EMFILE, "x", "a.pt"), ["a.pt: Too many open files", "ulimit -n"]),
        (OSError(errno.ENFILE, "x"), ["Too many open files", "ulimit -n"]),
        (OSError(errno.EACCES, "x", "a.pt"), ["a.pt: Permission denied", "chmod"]),
        (OSError(errno.EROFS, "x", "a.pt"), ["a.pt: Read-only", "place that can be written"]),
        (OSError(errno.EISDIR, "x", "a.pt"), ["a.pt: Is a directory", "a file is needed"]),
        (OSError(errno.ENOTDIR, "x", "a.pt"), ["a.pt: Not a directory", "a folder is needed"]),
        (OSError(errno.ELOOP, "x", "a.pt"), ["a.pt: Too many levels of symbolic links", "itself"]),
        (OSError(errno.ENOENT, "No such file or directory", "a.pt"), ["a.pt: No such file", "check the path"]),
        (OSError("512 requested and 8 written"), ["No space left"]),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), ["No space left"]),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), ["memory", "smaller batches"]),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), ["ulimit -n"]),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), ["/tmp", "TMPDIR"]),
        (RuntimeError("No `Args` section is found in the docstring of `A`."), ["PYTHONOPTIMIZE"]),
        (MemoryError(), ["memory", "smaller batches"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to …"), ["CUDA out of memory; choose smaller"]),
        (ModuleNotFoundError("No module named 'absent.part'", name="absent.part"), ["absent", "pip install"]),
        (InputError("--x 1 is wrong; pass 2"), ["--x 1 is wrong; pass 2"]),
    ],
)
def test_a_command_ends_in_one_line_that_names_culprit_and_remedy(error, words, capsys):
    code, printed = end_of(error, capsys)
    assert code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert all(word in printed for word in words), printed


def test_torchrun_repeats_the_line_at_its_end(tmp_path, monkeypatch, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    end_of(InputError("--x 1 is wrong; pass 2"), capsys)
    said = str(ChildFailedError("train.py", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert "error: --x 1 is wrong; pass 2" in said.splitlines()[-2]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    assert end_of(InputError("--x 1 is wrong; pass 2"), capsys)[0] == 2


def test_future_warnings_of_libraries_stay_unseen_unless_asked_for(monkeypatch):
    for asked, seen in ((["default"], 1), ([], 0)):
        monkeypatch.setattr("sys.warnoptions", asked)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with exit_on_input_error():
                warnings.warn("a library's", FutureWarning, stacklevel=1)
        assert len(caught) == seen


def test_a_message_is_one_line_whatever_the_names_in_it():
    assert str(InputError("a\n\x1b[31mb é; name another")) == "a [31mb é; name another"


def test_ctrl_c_has_an_exit_code_of_its_own(capsys):
    code, printed = end_of(KeyboardInterrupt(), capsys)
    assert (code, printed.count("\n")) == (130, 1) and "run the same again" in printed


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), ConnectionError("x"), ValueError("No space left")])
def test_our_own_mistakes_keep_their_traceback(error):
    with pytest.raises(type(error)), exit_on_input_error():
        raise error


def test_the_cause_is_found_behind_what_a_library_makes_of_it():
    try:
        try:
            raise OSError(errno.EMFILE, "Too many open files", "a.safetensors")
        except OSError:
            raise ValueError("no file named model.safetensors in folder") from None
    except ValueError as error:
        assert system_fault(error, "folder").startswith("a.safetensors: Too many open files; ")
    assert system_fault(ValueError("bad magic number")) is None
    assert system_fault(InputError("--out x: Permission denied")) is None


def test_a_remedy_for_content_is_given_for_content_only():
    assert str(unreadable(OSError(errno.ENOENT, "No such file"), "x", "encode again")).endswith("encode again")
    assert "encode again" not in str(unreadable(OSError(errno.EMFILE, "Too many"), "x", "encode again"))


@pytest.mark.parametrize(
    "read",
    [lambda path: read_array(path, "encode again"), read_file, lambda path: PngFiles(path.parent).missing(1)],
    ids=["latents", "checkpoint", "samples"],
)
def test_too_many_open_files_say_nothing_of_content(tmp_path, read):
    path = tmp_path / "000000.png"
    path.write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises((InputError, OSError)) as caught:
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("damaged", "truncated", "encode", "copy", "delete"))


def test_names_that_the_terminal_cannot_show_end_no_command(tmp_path):
    text = os.fsdecode(b"\xff\xe9") + "é"
    done = programs.run("-m", "training.plot", tmp_path / text, LC_ALL="C", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_run_that_may_write_no_file_ends_in_one_line(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    limits = ((resource.RLIMIT_FSIZE, 2**14),)
    run = programs.start("train.py", *tiny.train_flags(data, tmp_path), limits=limits)
    assert run.wait() == 2
    errors = [line for line in run.stderr.read_text().splitlines() if "error: " in line]
    assert len(errors) == 1 and "0000004.pt" in errors[0] and "free space" in errors[0]
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's default: the write fails instead

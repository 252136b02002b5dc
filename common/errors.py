"""What is said to the user: remarks, and the one kind of exception for a mistake with the one way it ends a command."""

import contextlib
import difflib
import errno
import importlib.util
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

EXIT_INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
EXIT_STOPPED = 75  # sysexits.h, EX_TEMPFAIL: not finished; the same command with --resume auto continues
TURN = 5  # seconds for which other processes leave it to the first to report a common error
TYPED = {}  # {flag, or flag and value: the words typed for it}, for messages
ROOM = "free space, or raise the quota (ulimit -f), and run the same again: what is finished is kept"
REMEDIES = {  # by errno, for what the operating system refuses, which says nothing about a file's content
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ROOM),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n 4096); run the same again"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a folder is needed where a file is; move it, or name another"),
    errno.EACCES: "permit it (chmod, chown), or name another place",
    errno.EISDIR: "a file is needed where a folder is; move it, or name another file",
    errno.ELOOP: "the link leads to itself; name another file",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "choose smaller batches, or a machine with more memory",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or its connection, and run the same again"),
}
WORDS = {  # patterns in the messages of library exceptions that have no errno
    r"\d+ requested and \d+ written|unexpected pos|PytorchStreamWriter failed": errno.ENOSPC,
    r"can't allocate memory": errno.ENOMEM,
    **{re.escape(os.strerror(number)): number for number in REMEDIES},
}


class InputError(ValueError):
    """A mistake in flags, files or data. The message is one line: the culprit (file or flag) and the remedy."""

    def __init__(self, message):
        super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(message)))  # names may contain newlines and escapes


def system_error(error):
    """The OSError behind an exception that the operating system caused; None if a file's content caused it.

    Libraries hide the OSError in their message or in the chained exception.
    """
    chain = [] if isinstance(error, InputError) else [error]
    while chain and (before := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(before)
    for found in chain:
        number = errno.ENOMEM if isinstance(found, MemoryError) else getattr(found, "errno", None)
        if number in REMEDIES:
            return OSError(number, os.strerror(number), getattr(found, "filename", None))
    numbers = (number for found in chain for words, number in WORDS.items() if re.search(words, str(found)))
    return next((OSError(number, os.strerror(number)) for number in numbers), None)


def system_fault(error, path=None):
    """One line with a system error and its remedy, else None. path: the file to name if the exception names none."""
    if (found := system_error(error)) is None:
        return None
    place = found.filename or path
    return f"{f'{place}: ' if place else ''}{found.strerror}; {REMEDIES[found.errno]}"


def unreadable(error, where, remedy):
    """InputError for an OSError on reading the file `where`; remedy: used for an errno without one in REMEDIES."""
    return InputError(f"{where} cannot be read ({error.strerror or error}); {REMEDIES.get(error.errno, remedy)}")


@contextlib.contextmanager
def exit_on_input_error():
    """On an InputError, end the command with one line on stderr and exit code 2; a bug keeps its traceback.

    System errors (no space, no permission, …) and failures of torch's compiler end the same way, Ctrl-C with exit code
    130. The first process prints at once; the others wait, so that the launcher ends them before they repeat the line.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may not be printable in the terminal's encoding
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # from libraries
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted; run the same again to continue", EXIT_INTERRUPTED)
    except Exception as error:
        if (line := _in_one_line(error)) is None:
            raise
        _end(f"error: {line}", 2)


def _in_one_line(error):
    """The line to print instead of a traceback; None for a bug in this program."""
    if isinstance(error, InputError):
        return as_typed(str(error))
    compiler = sys.modules.get("torch._dynamo.exc")  # only imported together with the compiler
    if compiler and isinstance(error, compiler.TorchDynamoException):
        reason = first_line(getattr(error, "inner_exception", error))
        return f"--compile fails on this machine ({reason}); pass --no-compile, or mend the compiler"
    if isinstance(error, ModuleNotFoundError) and error.name and not importlib.util.find_spec(error.name.split(".")[0]):
        return f"the package {error.name.split('.')[0]} is not installed; pip install -r requirements.txt"
    if "in the docstring of" in str(error):  # diffusers and transformers
        return "a library reads docstrings, which python -OO drops; unset PYTHONOPTIMIZE, or set it to 1"
    if isinstance(error, OSError | MemoryError | RuntimeError | ImportError) and (fault := system_fault(error)):
        return fault
    if isinstance(error, RuntimeError) and "out of memory" in str(error):  # on a GPU
        return f"{first_line(error).partition('. ')[0]}; {REMEDIES[errno.ENOMEM]}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}; check the path"
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # tempfile found none
        return f"{error.strerror}; free space there, or set TMPDIR to another folder"
    return None


def _end(line, code):
    if os.environ.get("RANK", "0") != "0":
        time.sleep(TURN)
    report(line)
    sys.exit(code)


def report(line):
    """Print the final message of a failing command, and record it for torchrun."""
    if record := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints its contents at the end
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(f"{record}.part").write_text(json.dumps({"message": message}))
            os.replace(f"{record}.part", record)
    with contextlib.suppress(OSError):  # stderr may go to the same full disk
        print(line, file=sys.stderr, flush=True)


def first_line(error):
    """One line about an exception: the first of its text, else its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def did_you_mean(word, choices):
    """`did you mean CHOICE? ` with the closest choice; empty if none is close."""
    return "".join(f"did you mean {choice}? " for choice in difflib.get_close_matches(word, choices, 1))


def as_typed(text):
    """The message with flags as the user typed them."""
    ours = "|".join(sorted(map(re.escape, TYPED), key=len, reverse=True))  # a flag and its value before the flag alone
    return re.sub(rf"(?<![\w-])({ours})(?![\w-])", lambda flag: TYPED[flag[0]], text) if TYPED else text


def note(text):
    """Print a remark to stderr once, whatever the number of processes."""
    say(text, sys.stderr)


def say(text, file=None):
    """Print a line to stdout once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":  # a `next:` line may name a program without the typed flags
        print(text if text.startswith("next: ") else as_typed(text), file=file, flush=True)

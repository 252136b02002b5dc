"""One kind of exception for a user's mistake, and the one way it ends a command."""

import contextlib
import sys


class InputError(ValueError):
    """A mistake in flags, files or data. The message is one line: the culprit (file or flag) and the remedy."""


@contextlib.contextmanager
def exit_on_input_error():
    """End the command with one line on stderr and exit code 2 on an InputError; anything else keeps its traceback."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

"""torchrun for the recipes. If a program fails with an `error:` line, that line is repeated at the end.

python -m common.launch --standalone --nproc-per-node 8 train.py --exp-name first
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def error_line(failed):
    """The `error:` line of the process that failed first (common/errors.py records it), else ""."""
    message = failed.get_first_failure()[1].message
    line = message["message"] if isinstance(message, dict) else message
    return line if line.startswith("error: ") else ""


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as failed:
        if line := error_line(failed):
            sys.exit(line)  # printed last; the exit code is 1, as torchrun's
        raise

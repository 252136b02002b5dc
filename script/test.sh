#!/usr/bin/env bash
# The tests, on CPU and offline after installation.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash script/test.sh [--slow] [PYTEST ARGUMENTS]

Sets up .venv and runs the tests on CPU (minutes on two cores). --slow also runs those marked slow (kill tests, long
runs). Other arguments go to pytest, e.g. -k parity; PARITY_FIXTURES=DIR takes other reference values.

Inside an active virtual or conda environment that one is used and no .venv is made:
    source my-env/bin/activate && bash script/test.sh
Environment: TORCH_INDEX_URL  wheel index for PyTorch, e.g. https://download.pytorch.org/whl/cpu (small CPU wheels)
             PYTHON           interpreter that makes .venv (python3)
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
# On CPU everywhere; those that need a GPU: python -m pytest -m gpu
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@" # one process per core, for memory at most 4

# Sourced by the other scripts: makes sure that a Python environment with the requirements is active.
#   source script/setup.sh requirements.txt
# Inside an active environment (venv or conda) that one is used; otherwise .venv is made once and reused.

fail() { echo "error: $*" >&2; exit 2; }

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$1 is older than Python 3.10; set PYTHON to a newer one"
}

activate_environment() {
    # conda's base is often active without anybody having asked for it
    if [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; }; then
        echo "using the active environment ${VIRTUAL_ENV:-$CONDA_PREFIX}"
        check_version python
        return
    fi
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "$python not found; install Python 3.10 or newer, or set PYTHON"
    if [ ! -x .venv/bin/pip ]; then # an interrupted one has no pip
        check_version "$python"
        "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "the venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"
        echo "making .venv"
        "$python" -m venv --clear .venv || fail "python -m venv .venv failed; see above"
    fi
    . .venv/bin/activate
}

installs_this_checkout() { # not another one, which shares the environment
    [ "$(cd / && python -c 'import common; print(common.__path__[0])' 2>/dev/null)" = "$(pwd -P)/common" ]
}

install_requirements() {
    local file=$1 stamp
    stamp=$(python -c 'import sys; print(sys.prefix)')/.installed-$(cat requirements*.txt pyproject.toml "$file" | cksum | cut -d' ' -f1)
    [ -e "$stamp" ] && installs_this_checkout && return
    echo "installing $file (PyTorch's default wheels are several GB; TORCH_INDEX_URL takes another index)"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        # from the same index, because a torchvision built for another torch does not import
        # shellcheck disable=SC2046  # one word each
        python -m pip install --disable-pip-version-check -q $(grep -E '^(torch|torchvision)[>=<]' requirements.txt) --index-url "$TORCH_INDEX_URL" || fail "installing torch from $TORCH_INDEX_URL failed; see above"
    fi
    python -m pip install --disable-pip-version-check -q -r "$file" || fail "installing $file failed; see above"
    touch "$stamp" 2>/dev/null || true
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
activate_environment
install_requirements "$1"

#!/bin/sh
# Install Capo and everything it runs on into ./.venv. Run again at any time: it does nothing when nothing changed.
#
#   CAPO_DEVICE        cpu or gpu; default: gpu if nvidia-smi works, else cpu
#   CAPO_PYTHON        the interpreter to build the environment with; default: python3.11, python3.12 or python3
#   CAPO_TORCH_INDEX   where the CPU build of torch comes from when pip's own sources do not have it
set -eu
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
    for candidate in "${CAPO_PYTHON:-}" python3.11 python3.12 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed; name one with CAPO_PYTHON=/path/to/python"
}

device=${CAPO_DEVICE:-}
if [ -z "$device" ]; then
    if nvidia-smi >/dev/null 2>&1; then device=gpu; else device=cpu; fi
fi
case "$device" in cpu | gpu) ;; *) fail "CAPO_DEVICE is '$device'; it must be cpu or gpu" ;; esac

stamp=.venv/capo-setup
wanted="$device $(cat pyproject.toml requirements-cpu.lock scripts/setup.sh | sha256sum | cut -c1-64) $(pwd)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "setup: .venv is up to date ($device)"
    exit 0
fi

python=$(find_python)
# pypcre (a dependency of GPTQModel) comes as source only and compiles a small C extension.
command -v "${CC:-cc}" >/dev/null || fail "a C compiler is needed (Debian: apt-get install build-essential python3-dev)"
# Where making it was interrupted, its python is there and its pip is not.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv

# Notices about package sources that do not have a package are noise; errors are not.
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --quiet "$@"; }

echo "setup: installing for $device into .venv (a few minutes the first time)"
if [ "$device" = cpu ]; then
    # The lock is the whole set, so nothing is resolved: pip would otherwise pull CUDA builds of packages that are
    # not needed, and they break the import of transformers (torchvision, torchaudio, torchcodec).
    torch=$(grep '^torch==' requirements-cpu.lock)
    pip --no-deps "$torch" 2>/dev/null ||
        pip --no-deps --index-url "${CAPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch"
    pip --no-deps -r requirements-cpu.lock
    pip --no-deps -e .
else
    pip -e '.[gpu,dev]'
fi
echo "$wanted" >"$stamp"
echo "setup: done"

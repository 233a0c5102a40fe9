#!/bin/sh
# Everything Capo runs on, into /opt/capo (a virtual environment). Changes only with the lock, so that the layer is kept.
#
#   install_dependencies.sh cpu|gpu|ray      ray: what a Ray node needs beside cpu
#
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS   as pip knows them
#   CAPO_TORCH_INDEX   where the CPU build of torch comes from when pip's own sources do not have it
set -eu
here=$(cd "$(dirname "$0")" && pwd)
device=${1:?say cpu, gpu or ray}
target=${CAPO_PREFIX:-/opt/capo}
lock="$here/requirements-$device.lock"
[ -f "$lock" ] || { echo "install_dependencies.sh: there is no $lock" >&2; exit 2; }
[ -x "$target/bin/python" ] || python3 -m venv "$target"
pip() { "$target/bin/python" -m pip --disable-pip-version-check install --no-deps --no-compile "$@"; }
if [ "$device" = cpu ]; then
    torch=$(grep '^torch==' "$lock")
    pip -q "$torch" 2>/dev/null || pip -q --index-url "${CAPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch"
fi
pip -q -r "$lock"

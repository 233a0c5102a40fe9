#!/bin/sh
# Capo itself, from the sources beside this script's folder, into the environment that install_dependencies.sh made.
set -eu
sources=$(cd "$(dirname "$0")/../.." && pwd)
target=${CAPO_PREFIX:-/opt/capo}
"$target/bin/python" -m pip --disable-pip-version-check install -q --no-deps --no-compile "$sources"
# pip is no part of a running service, and what it cannot install nobody can through it.
"$target/bin/python" -m pip --disable-pip-version-check uninstall -q -y pip
# Compiled once here: the root file system of a running container is read-only, and imports would be slow for ever.
"$target/bin/python" -m compileall -q -j 0 "$target/lib" || true
"$target/bin/capo" --help >/dev/null

#!/bin/sh
# The Debian packages of an image: `runtime` is what stays, `build` what only the building stage needs.
set -eu
case "${1:-}" in
# numactl: vLLM's CPU engine looks up the cores of each NUMA node. tini: reaps what orphaned children leave to process 1.
runtime) packages="python3 libnuma1 libgomp1 libgoogle-perftools4 tini ca-certificates" ;;
# pypcre comes as source only, and so does Capo itself.
build) packages="python3-venv python3-dev gcc g++ libc6-dev" ;;
# Triton, which vLLM's LoRA kernels on a GPU are written in, compiles its launch stubs when a kernel first runs.
gpu-runtime) packages="gcc libc6-dev python3-dev" ;;
*) echo "packages.sh: say runtime, build or gpu-runtime" >&2; exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086 # a list
apt-get install -y -q --no-install-recommends $packages
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig

#!/bin/sh
# A tag is another image tomorrow: nothing is built on a base that is not named by its digest.
set -eu
echo "${BASE_IMAGE:-}" | grep -Eq '^[^@[:space:]]+@sha256:[0-9a-f]{64}$' || {
    echo "BASE_IMAGE is '${BASE_IMAGE:-}'; name it by its digest, as debian:bookworm-slim@sha256:... (64 digits)" >&2
    exit 2
}

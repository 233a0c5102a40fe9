#!/bin/sh
# The image's user and the two directories that are its own. The building's scripts go.
set -eu
groupadd --gid 10001 capo
useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin capo
install -d -o 10001 -g 10001 -m 0750 /data /cache
# Older KubeRay operators start Ray from a login shell, for which Debian sets PATH anew.
echo 'PATH=/opt/capo/bin:$PATH' >/etc/profile.d/capo.sh
rm -rf /opt/build

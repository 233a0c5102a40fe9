#!/bin/sh
# Install the programs that the tests run and this machine lacks, from Debian's packages. Does nothing when all are there.
#
# PostgreSQL (the job store on several machines), Prometheus with promtool (rules, dashboards), HAProxy (two replicas
# behind one address), debootstrap (a clean root for the container's steps), sqlite3 (the runbook's backup). kubectl comes
# from Kubernetes itself: Debian 12's is too old for the manifests.
set -eu

fail() { echo "test_programs: $*" >&2; exit 1; }
lacks() { ! PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }
lacks_postgres() { lacks postgres && ! ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1; }

packages=
if lacks promtool || lacks prometheus; then packages="$packages prometheus"; fi
if lacks haproxy; then packages="$packages haproxy"; fi
if lacks_postgres; then packages="$packages postgresql"; fi
if lacks debootstrap; then packages="$packages debootstrap"; fi
if lacks sqlite3; then packages="$packages sqlite3"; fi

if [ -n "$packages" ]; then
    install="apt-get install --no-install-recommends$packages"
    lacks apt-get && fail "the tests need programs that this machine lacks; install$packages"
    if [ "$(id -u)" -eq 0 ]; then
        root=
    elif sudo -n true 2>/dev/null; then
        root="sudo -n"
    else
        fail "the tests need programs that this machine lacks; run as root: $install"
    fi

    # The packages bring services that would start now and at every boot; the tests start processes of their own.
    policy=/usr/sbin/policy-rc.d
    cluster=/etc/postgresql-common/createcluster.d/capo-tests.conf
    ours=
    clean() { [ -z "$ours" ] || $root rm -f $ours; }
    trap clean EXIT
    if [ ! -e "$policy" ]; then
        ours="$policy"
        printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null
        $root chmod 755 "$policy"
    fi
    if lacks_postgres; then
        ours="$ours $cluster"
        $root mkdir -p "${cluster%/*}"
        echo "create_main_cluster = false" | $root tee "$cluster" >/dev/null
    fi
    echo "test_programs: installing$packages"
    log=$(mktemp)
    if ! $root env DEBIAN_FRONTEND=noninteractive $install -y -q >"$log" 2>&1; then
        # The package lists may be missing or old.
        $root apt-get update -q >"$log" 2>&1 || true
        if ! $root env DEBIAN_FRONTEND=noninteractive $install -y -q >>"$log" 2>&1; then
            tail -n 20 "$log" >&2
            rm -f "$log"
            fail "the installation failed; run as root: $install"
        fi
    fi
    rm -f "$log"
    if [ -d /run/systemd/system ]; then
        for service in prometheus haproxy; do
            case "$packages" in *" $service"*) $root systemctl disable --quiet "$service" || true ;; esac
        done
    fi
fi

if lacks kubectl; then
    fail "the tests of deploy/kubernetes need kubectl 1.27 or newer: https://kubernetes.io/docs/tasks/tools/"
fi

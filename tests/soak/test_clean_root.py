"""The image's steps, run where Docker would run them: in a clean Debian that debootstrap makes. Needs root.

One root becomes the building stage, a copy from before that the image; then Capo runs in it as the image's user, on a
root file system that is mounted read-only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.render import ROOT
from tests.programs import program

SUITE = "bookworm"
CERTIFICATES = "etc/certificates-of-the-machine.crt"
# What .dockerignore lets into the build.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "capo", "serve", "tune", "registry", "proto", "deploy/container")


def run(*command: str, seconds: float = 1200) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy(source: Path, target: Path) -> None:
    """A root holds devices, and shutil would read /dev/zero to its end."""
    run("cp", "--archive", "--one-file-system", str(source), str(target))


class CleanRoot:
    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str) -> str:
        """In a mount namespace of its own, where the machine's package sources for pip are visible too."""
        inside = ["chroot", str(self.path), "/usr/bin/env", "-i", *_environment(), *command]
        mounts = [f"mount --bind {place} {self.path}{place}" for place in _pip_directories()]
        mounts.append(f"mount -t proc proc {self.path}/proc")
        script = " && ".join([*mounts, 'exec "$@"'])
        return run("unshare", "--mount", "sh", "-c", script, "sh", *inside)

    def has(self, name: str) -> bool:
        return any((self.path / folder / name).exists() for folder in ("usr/bin", "usr/sbin", "opt/capo/bin"))

    def copy_in(self, *paths: str, to: str) -> None:
        target = self.path / to.lstrip("/")
        for path in paths:
            source = ROOT / path
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, place)


def _pip_settings() -> dict[str, str]:
    lines = run(program("pip3"), "config", "list").splitlines()
    found = {}
    for line in lines:
        key, _, value = line.partition("=")
        found[key.rpartition(".")[2]] = value.strip("'")
    return found


def _environment() -> list[str]:
    """pip and apt reach the same sources as outside."""
    settings = _pip_settings() | {"cert": f"/{CERTIFICATES}"}
    given = [f"PIP_{key.upper().replace('-', '_')}={value}" for key, value in settings.items()]
    proxies = [f"{name}={value}" for name, value in os.environ.items() if name.lower().endswith("_proxy")]
    return ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", *given, *proxies]


def _pip_directories() -> list[str]:
    words = " ".join(_pip_settings().values()).split()
    places = [Path(word.removeprefix("file://")) for word in words]
    # An index of files is named by its innermost folder.
    roots = {place.parent if place.name == "simple" else place for place in places if place.is_absolute()}
    return sorted(str(place) for place in roots if place.is_dir())


@pytest.fixture
def clean_root(tmp_path: Path) -> Iterator[CleanRoot]:
    assert os.geteuid() == 0, "debootstrap and chroot need root; run the long proofs as root"
    root = CleanRoot(tmp_path / "image")
    run(program("debootstrap"), "--variant=minbase", SUITE, str(root.path))
    for place in _pip_directories():
        (root.path / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name in ("etc/resolv.conf", "etc/hosts"):
        shutil.copy2(f"/{name}", root.path / name)
    # Under another name: the package ca-certificates makes its own file anew.
    shutil.copy2("/etc/ssl/certs/ca-certificates.crt", root.path / CERTIFICATES)
    yield root
    # Several gigabytes, and what is mounted in there is mounted in other namespaces only.
    run("rm", "-rf", "--one-file-system", str(tmp_path))


def test_the_images_steps_make_a_service_in_a_clean_debian(clean_root: CleanRoot, tmp_path: Path) -> None:
    image = clean_root
    image.copy_in("deploy/container/packages.sh", to="/opt/build")
    image.run("/opt/build/deploy/container/packages.sh", "runtime")

    copy(image.path, tmp_path / "build")
    build = CleanRoot(tmp_path / "build")
    build.run("/opt/build/deploy/container/packages.sh", "build")
    build.copy_in(*SOURCES, to="/src")
    build.run("/src/deploy/container/install_dependencies.sh", "cpu")
    build.run("/src/deploy/container/install_capo.sh")
    assert build.has("gcc")

    copy(build.path / "opt/capo", image.path / "opt/capo")
    shutil.rmtree(image.path / "opt/build")
    assert not any(image.has(name) for name in ("gcc", "cc", "g++", "clang", "make", "pip", "pip3"))
    for name in ("data", "cache"):
        (image.path / name).mkdir()
        os.chown(image.path / name, 10001, 10001)
    told = serve_read_only(image)
    assert '"id":"capo-tiny"' in told.replace(" ", "")


def serve_read_only(image: CleanRoot) -> str:
    """Start Capo as the image does, ask it for a completion, and end it."""
    root = image.path
    script = f"""
    set -e
    mount --bind {root} {root} && mount -o remount,ro,bind {root}
    mount -t proc proc {root}/proc
    mount -t tmpfs tmpfs {root}/tmp && mount -t tmpfs tmpfs {root}/data && mount -t tmpfs tmpfs {root}/cache
    mount -t tmpfs tmpfs {root}/dev && mknod -m 666 {root}/dev/null c 1 3 && mknod -m 666 {root}/dev/urandom c 1 9
    mkdir -m 1777 {root}/dev/shm && chown 10001:10001 {root}/data {root}/cache
    ip link set lo up 2>/dev/null || true
    exec chroot --userspec=10001:10001 {root} /usr/bin/env -i PATH=/opt/capo/bin:/usr/bin:/bin HOME=/cache \\
        XDG_CACHE_HOME=/cache VLLM_CACHE_ROOT=/cache/vllm CAPO_DATA_DIR=/data PYTHONDONTWRITEBYTECODE=1 \\
        OMP_WAIT_POLICY=PASSIVE CAPO_PORT=18000 CAPO_GRPC_PORT=18051 python - <<'PYTHON'
{_CONVERSATION}
PYTHON
    """
    return run("unshare", "--mount", "sh", "-c", script, seconds=300)


_CONVERSATION = """
import signal, subprocess, sys, time, urllib.request
try:
    open('/opt/capo/written', 'w')
    sys.exit('the root file system can be written to')
except OSError:
    pass
service = subprocess.Popen(['tini', '-s', '--', 'capo', 'serve', '--workers', '0'])
url = 'http://127.0.0.1:18000'
for _ in range(240):
    time.sleep(1)
    try:
        if urllib.request.urlopen(url + '/readyz', timeout=2).status == 200:
            break
    except OSError:
        if service.poll() is not None:
            sys.exit(f'ended with {service.returncode}')
body = b'{"model": "capo-tiny", "prompt": "Who are you?", "max_tokens": 8}'
request = urllib.request.Request(url + '/v1/completions', body, {'Content-Type': 'application/json'})
assert b'"text"' in urllib.request.urlopen(request, timeout=60).read()
print(urllib.request.urlopen(url + '/v1/models', timeout=10).read().decode())
service.send_signal(signal.SIGTERM)
assert service.wait(60) == 0, service.returncode
"""

"""The Dockerfile's steps, run where Docker would run them: in a clean Debian that debootstrap makes. Needs root.

Each stage is a root of its own. In those of the last stages what the image starts runs as the image's user, on a root
file system that is mounted read-only, and its own health check asks for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.dockerfile import environment, read_stages, values
from tests.deploy.render import ROOT
from tests.programs import program

SUITE = "bookworm"
CERTIFICATES = "etc/certificates-of-the-machine.crt"
BASE_IMAGE = f"debian:bookworm-slim@sha256:{'0' * 64}"
"""As which debootstrap's root passes."""


def run(*command: str, seconds: float = 1200) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-20_000:]}"
    return done.stdout


def copy(source: Path, target: Path, *options: str) -> None:
    """A root holds devices, and shutil would read /dev/zero to its end."""
    run("cp", "--archive", "--one-file-system", *options, str(source), str(target))


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


class Build:
    """The stages of the Dockerfile as directories, made when they are asked for."""

    def __init__(self, bare: CleanRoot, directory: Path) -> None:
        self._bare, self._directory = bare, directory
        (directory / "docker").mkdir()
        self.stages = read_stages(directory / "docker")
        self._made: dict[str, CleanRoot] = {}

    def made(self, name: str) -> CleanRoot:
        if name not in self._made:
            stage = self.stages[name]
            base = self.made(stage.base) if stage.base in self.stages else self._bare
            root = CleanRoot(self._directory / name)
            # Gigabytes of dependencies; what is installed after them replaces files and writes into none.
            copy(base.path, root.path, *(["--link"] if stage.base.startswith("dependencies") else []))
            for instruction, value in stage.steps:
                if instruction == "COPY":
                    self._copy(root, *value.split())
                elif instruction == "RUN":
                    root.run(*json.loads(re.sub(r"^(--mount=\S+\s+)*", "", value)))
            self._made[name] = root
        return self._made[name]

    def _copy(self, root: CleanRoot, *words: str) -> None:
        target = root.path / words[-1].lstrip("/")
        if words[0].startswith("--from="):
            source = self.made(words[0].removeprefix("--from="))
            copy(source.path / words[1].lstrip("/"), target, "--link")
            return
        for name in _what_goes_into_a_build() if words[0] == "." else words[:-1]:
            place = (
                target / name if words[0] == "." else target / Path(name).name if words[-1].endswith("/") else target
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, place)


def _what_goes_into_a_build() -> list[str]:
    return [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


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
    return ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", f"BASE_IMAGE={BASE_IMAGE}", *given, *proxies]


def _pip_directories() -> list[str]:
    words = " ".join(_pip_settings().values()).split()
    places = [Path(word.removeprefix("file://")) for word in words]
    # An index of files is named by its innermost folder.
    roots = {place.parent if place.name == "simple" else place for place in places if place.is_absolute()}
    return sorted(str(place) for place in roots if place.is_dir())


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    assert os.geteuid() == 0, "debootstrap and chroot need root; run the long proofs as root"
    directory = tmp_path_factory.mktemp("build")
    bare = CleanRoot(directory / "bare")
    run(program("debootstrap"), "--variant=minbase", SUITE, str(bare.path))
    for place in _pip_directories():
        (bare.path / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name in ("etc/resolv.conf", "etc/hosts"):
        shutil.copy2(f"/{name}", bare.path / name)
    # Under another name: the package ca-certificates makes its own file anew.
    shutil.copy2("/etc/ssl/certs/ca-certificates.crt", bare.path / CERTIFICATES)
    yield Build(bare, directory)
    # Several gigabytes, and what is mounted in there is mounted in other namespaces only.
    run("rm", "-rf", "--one-file-system", str(directory))


def test_the_cpu_image_serves_and_its_health_check_knows(build: Build) -> None:
    image = build.made("cpu")
    assert build.made("build").has("gcc")
    assert not any(image.has(name) for name in ("gcc", "cc", "g++", "clang", "make", "pip", "pip3"))
    assert not (image.path / "opt/build").exists()
    start = [json.loads(values(build.stages, "cpu", name)[-1]) for name in ("ENTRYPOINT", "CMD")]
    # Without keys it listens to this machine alone.
    told = run_read_only(build, "cpu", _SERVES, [*start[0], *start[1], "--workers", "0"], CAPO_HOST="127.0.0.1")
    assert '"id":"capo-tiny"' in told.replace(" ", "")


def test_the_ray_image_is_a_node_with_capo_on_its_path_and_its_health_check_knows(build: Build) -> None:
    """Started as KubeRay starts it: by bash, which older operators made a login shell."""
    arguments = "--head --block --num-cpus=0 --object-store-memory=80000000 --disable-usage-stats"
    for shell in ("-c", "-lc"):
        start = ["bash", shell, "--", f"ulimit -n 65536; ray start {arguments}"]
        assert "capo is there" in run_read_only(build, "ray", _IS_A_NODE, start)


def run_read_only(build: Build, target: str, conversation: str, start: list[str], **settings: str) -> str:
    """``conversation`` in the image, as Docker would run it there; it is given what to start and the health check."""
    root = build.made(target).path
    health = json.loads(values(build.stages, target, "HEALTHCHECK")[-1].partition("CMD ")[2])
    given = environment(build.stages, target) | settings
    script = f"""
    set -e
    mount --bind {root} {root} && mount -o remount,ro,bind {root}
    mount -t proc proc {root}/proc && mount --bind /sys {root}/sys && mount -o remount,ro,bind {root}/sys
    mount -t tmpfs tmpfs {root}/tmp && mount -t tmpfs tmpfs {root}/data && mount -t tmpfs tmpfs {root}/cache
    mount -t tmpfs tmpfs {root}/dev && mknod -m 666 {root}/dev/null c 1 3 && mknod -m 666 {root}/dev/urandom c 1 9
    mkdir -m 1777 {root}/dev/shm && chown 10001:10001 {root}/data {root}/cache
    ip link set lo up
    exec chroot --userspec=10001:10001 {root} /usr/bin/env -i "$@"
    """
    inside = [*(f"{name}={value}" for name, value in given.items()), "python", "-c", _PREFACE + conversation]
    # Networks and processes of its own, which end with it.
    namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    return run(*namespaces, "sh", "-c", script, "sh", *inside, json.dumps(start), json.dumps(health), seconds=300)


_PREFACE = """
import json, signal, subprocess, sys, time, urllib.request
try:
    open('/opt/capo/written', 'w')
    sys.exit('the root file system can be written to')
except OSError:
    pass
start, health = map(json.loads, sys.argv[1:])
def is_healthy():
    return subprocess.run(health, stderr=subprocess.DEVNULL).returncode == 0
def wait(condition):
    for _ in range(240):
        time.sleep(1)
        if condition():
            return
        if service.poll() is not None:
            sys.exit(f'ended with {service.returncode}')
    sys.exit('not in time')
assert not is_healthy(), 'nothing runs yet'
service = subprocess.Popen(start, cwd='/data')
wait(is_healthy)
"""

_SERVES = """
url = 'http://127.0.0.1:8000'
def is_ready():
    try:
        return urllib.request.urlopen(url + '/readyz', timeout=2).status == 200
    except OSError:
        return False
wait(is_ready)
body = b'{"model": "capo-tiny", "prompt": "Who are you?", "max_tokens": 8}'
request = urllib.request.Request(url + '/v1/completions', body, {'Content-Type': 'application/json'})
assert b'"text"' in urllib.request.urlopen(request, timeout=60).read()
print(urllib.request.urlopen(url + '/v1/models', timeout=10).read().decode())
assert is_healthy()
service.send_signal(signal.SIGTERM)
assert service.wait(60) == 0, service.returncode
assert not is_healthy()
"""

_IS_A_NODE = """
assert urllib.request.urlopen('http://127.0.0.1:8265/api/gcs_healthz', timeout=5).status == 200
entrypoint = {"entrypoint": "capo worker --help > /dev/null && echo capo is there"}
request = urllib.request.Request('http://127.0.0.1:8265/api/jobs/', json.dumps(entrypoint).encode(),
                                 {'Content-Type': 'application/json'})
job = json.loads(urllib.request.urlopen(request, timeout=60).read())['submission_id']
def answer(path):
    return json.loads(urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/' + job + path, timeout=30).read())
wait(lambda: answer('')['status'] in ('SUCCEEDED', 'FAILED'))
print(answer('/logs')['logs'])
"""

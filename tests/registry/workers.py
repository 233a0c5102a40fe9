"""Other processes of the tests: ``python -m tests.registry.workers <command> <root> ...``.

They import only the registry, so that one starts in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from registry import BaseModelIdentity, ManifestDraft, Registry
from registry.errors import ConflictError

DRAFT = ManifestDraft(kind="merged", name="support", base_model=BaseModelIdentity(id="tiny"), dtype="float32")


def publish_forever(root: Path, *, num_files: int = 8, file_bytes: int = 128 << 10) -> None:
    """Publish new content again and again, in turns through a staging directory and from a directory of ours."""
    registry = Registry(root)
    outside = root.parent / f"outside-{os.getpid()}"
    outside.mkdir()
    for index in range(num_files):
        (outside / f"model-{index}.safetensors").write_bytes(b"x" * file_bytes)
    while True:
        with registry.stage() as staging:
            for index in range(num_files):
                (staging / f"model-{index}.safetensors").write_bytes(os.urandom(file_bytes))
            registry.publish(staging, DRAFT, alias="support")
        (outside / "model-0.safetensors").write_bytes(os.urandom(file_bytes))
        registry.publish(outside, DRAFT, alias="support")


def breed_publishers(root: Path) -> None:
    """For each line on stdin fork a publisher and print its process id; reap it before the next."""
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            publish_forever(root)
        print(child, flush=True)
        os.waitpid(child, 0)


def publish_times(root: Path, content: str, times: int) -> list[str]:
    registry = Registry(root)
    revisions: list[str] = []
    for _ in range(times):
        with registry.stage() as staging:
            for index in range(4):
                (staging / f"model-{index}.safetensors").write_bytes(content.encode() * 1000 * (index + 1))
            revisions.append(registry.publish(staging, DRAFT, alias="support").revision)
    return revisions


def advance_alias(root: Path, revisions: list[str]) -> list[int]:
    """Move the alias from each revision to the next, racing others; returns the steps that were ours."""
    registry = Registry(root)
    ours: list[int] = []
    while True:
        present = registry.resolve("support").revision
        step = revisions.index(present) + 1
        if step == len(revisions):
            return ours
        try:
            registry.set_alias("support", revisions[step], expected=present)
        except ConflictError:
            continue
        ours.append(step)


def main() -> None:
    command, root = sys.argv[1], Path(sys.argv[2])
    if command == "breed-publishers":
        breed_publishers(root)
        return
    start = root.parent / "start"
    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.001)
    if command == "publish":
        print(json.dumps(publish_times(root, sys.argv[3], int(sys.argv[4]))))
    elif command == "advance-alias":
        print(json.dumps(advance_alias(root, json.loads(sys.argv[3]))))


if __name__ == "__main__":
    main()

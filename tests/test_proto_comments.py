"""The .proto files are the reference of the gRPC interface: whoever generates a client of his own has nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

PROTO = Path(__file__).resolve().parents[1] / "proto"
FILES = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.glob("capo/v1/*.proto"))

# Numbers of the lists in google/protobuf/descriptor.proto, which a location's path consists of.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _NESTED_ENUMS = 2, 3, 4
_METHODS, _VALUES = 2, 2

Place = tuple[int, ...]


def parsed(file: str, folder: Path) -> FileDescriptorProto:
    """With its comments, as protoc itself attaches them."""
    out = folder / "descriptors"
    command = [sys.executable, "-W", "ignore", "-m", "grpc_tools.protoc", "-I", str(PROTO), "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={out}", file], check=True)
    (found,) = FileDescriptorSet.FromString(out.read_bytes()).file
    return found


def in_message(message: DescriptorProto, path: Place) -> Iterator[tuple[str, Place]]:
    if message.options.map_entry:
        return
    for number, field in enumerate(message.field):
        yield f"{message.name}.{field.name}", (*path, _FIELDS, number)
    for number, nested in enumerate(message.nested_type):
        yield from in_message(nested, (*path, _NESTED, number))
    for number, enum in enumerate(message.enum_type):
        for order, value in enumerate(enum.value):
            yield value.name, (*path, _NESTED_ENUMS, number, _VALUES, order)


def members(file: FileDescriptorProto) -> Iterator[tuple[str, Place]]:
    """Every field, enum value and call, and where protoc puts its comment."""
    for number, message in enumerate(file.message_type):
        yield from in_message(message, (_MESSAGES, number))
    for number, enum in enumerate(file.enum_type):
        for order, value in enumerate(enum.value):
            yield value.name, (_ENUMS, number, _VALUES, order)
    for number, service in enumerate(file.service):
        for order, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (_SERVICES, number, _METHODS, order)


def uncommented(file: FileDescriptorProto) -> list[str]:
    comments = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}
    return [name for name, path in members(file) if not comments.get(path)]


@pytest.mark.parametrize("file", FILES)
def test_every_field_enum_value_and_call_has_a_comment_of_its_own(file: str, tmp_path: Path) -> None:
    assert uncommented(parsed(file, tmp_path)) == []


def test_a_missing_comment_is_found(tmp_path: Path) -> None:
    found = parsed("capo/v1/adapters.proto", tmp_path)
    assert len(list(members(found))) > 50
    del found.source_code_info.location[:]
    assert uncommented(found) == [name for name, _ in members(found)]

"""A line of the audit log says what an act was about, whichever face it came by and however it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capo_proto.v1 import adapters_pb2 as pb
from tests.capo.guarded import HOUSE, bearer, guarded
from tests.serve.running import BASE

_RPC = "/capo.v1.Adapters/"


def _acts(directory: Path) -> list[tuple[str, dict[str, str]]]:
    """How each act ended, and what it was to change."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]
    return [(line["result"], line.get("changes", {})) for line in lines]


async def test_acts_over_grpc_name_what_they_were_about_also_where_they_were_refused(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(tenant=HOUSE))
        revision = service.publish("support", None, alias="front").revision
        for method, message in (
            ("PinAdapter", pb.PinAdapterRequest(reference=revision)),
            ("UnpinAdapter", pb.UnpinAdapterRequest(reference=revision)),
            ("PinAdapter", pb.PinAdapterRequest(reference="nosuch")),
            ("UnpinAdapter", pb.UnpinAdapterRequest(reference="nosuch")),
            ("SetAlias", pb.SetAliasRequest(alias=BASE, revision=revision)),
        ):
            await service.ask(_RPC + method, key, message=message.SerializeToString())
    assert _acts(tmp_path) == [
        ("ok", {"reference": revision}),
        ("ok", {"reference": revision}),
        ("model_not_found", {"reference": "nosuch"}),
        ("not_pinned", {"reference": "nosuch"}),
        ("reserved_name", {"alias": BASE, "revision": revision}),
    ]


async def test_an_import_that_is_refused_names_the_adapter_and_its_path(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(tenant=HOUSE))
        named = {"lora_name": "evil", "lora_path": "nosuch"}
        await service.ask("POST /v1/load_lora_adapter", key, json=named)
        await service.ask("POST /v1/unload_lora_adapter", key, json={"lora_name": "evil"})
    (loaded, unloaded) = _acts(tmp_path)
    assert loaded[1] == {"alias": "evil", "path": "nosuch"}
    assert unloaded[1] == {"alias": "evil"}


@pytest.mark.parametrize("operation", ["set", "roll back", "remove"])
async def test_an_alias_that_a_read_only_service_does_not_change_is_named(tmp_path: Path, operation: str) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(tenant=HOUSE))
        revision = service.publish("support", None, alias="front").revision
        service.service.catalog.registry.read_only = True
        method, message = {
            "set": ("SetAlias", pb.SetAliasRequest(alias="front", revision=revision)),
            "roll back": ("RollbackAlias", pb.RollbackAliasRequest(alias="front")),
            "remove": ("RemoveAlias", pb.RemoveAliasRequest(alias="front")),
        }[operation]
        await service.ask(_RPC + method, key, message=message.SerializeToString())
    ((result, changes),) = _acts(tmp_path)
    assert result == "registry_is_read_only"
    assert changes["alias"] == "front"


async def test_a_name_that_is_far_too_long_makes_no_long_line(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(tenant=HOUSE))
        message = pb.PinAdapterRequest(reference="x" * 1_000_000)
        await service.ask(_RPC + "PinAdapter", key, message=message.SerializeToString())
    assert (tmp_path / "audit.jsonl").stat().st_size < 2_000

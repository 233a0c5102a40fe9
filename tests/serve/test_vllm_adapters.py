"""vLLM's own adapter calls: its fields and answers, our checks, and nothing from outside the import folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from registry import Registry, errors, locate_base_model
from serve.gate import Gate
from serve.import_folder import ImportFolder
from serve.service import ServingService
from tests.registry.samples import adapter_tensors, write_adapter, write_base
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, running_service


@contextlib.asynccontextmanager
async def importing_service(
    tmp_path: Path, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ServingService, FakeEngine]]:
    """A service with the real gate, whose import folder is ``imports``."""
    engine = FakeEngine(max_loras=3)
    base = locate_base_model(str(write_base(tmp_path / "base")))
    (tmp_path / "imports").mkdir()
    registry_dir = tmp_path / "registry"
    gate = Gate(Registry(registry_dir), base)
    fields = {"gate": gate, "import_dir": tmp_path / "imports", "base_model": base} | options
    async with running_service(engine, registry_dir, **fields) as (client, service):
        yield client, service, engine


async def load(client: httpx.AsyncClient, name: str, path: Path | str, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return await client.post("/v1/load_lora_adapter", json=body)


async def unload(client: httpx.AsyncClient, name: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields})


async def answering_model(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


@pytest.mark.parametrize("form", ["absolute", "relative"])
async def test_an_adapter_is_loaded_answers_by_its_name_and_is_unloaded(tmp_path: Path, form: str) -> None:
    async with importing_service(tmp_path) as (client, service, engine):
        directory = write_adapter(tmp_path / "imports" / "team" / "sql")
        path = directory if form == "absolute" else "team/sql"
        response = await load(client, "sql-lora", path)
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'sql-lora' added successfully.")
        assert [adapter.name for adapter in engine.loaded.values()] == [await answering_model(client, "sql-lora")]
        names = {model["id"] for model in (await client.get("/v1/models")).json()["data"]}
        assert names == {BASE, "sql-lora"}
        response = await unload(client, "sql-lora")
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'sql-lora' removed successfully.")
        await eventually(lambda: not engine.loaded)
        assert (await unload(client, "sql-lora")).status_code == 404
        assert len(service.adapters()) == 1, "the registry keeps it"


async def test_a_name_is_loaded_again_only_in_place_and_then_means_the_new_content(tmp_path: Path) -> None:
    async with importing_service(tmp_path) as (client, _, _engine):
        one = write_adapter(tmp_path / "imports" / "one")
        two = write_adapter(tmp_path / "imports" / "two", tensors=adapter_tensors(seed=2))
        await load(client, "support", one)
        first = await answering_model(client, "support")
        again = await load(client, "support", two)
        assert again.status_code == 400
        assert "already been loaded" in again.json()["error"]["message"]
        assert await answering_model(client, "support") == first
        assert (await load(client, "support", two, load_inplace=True)).status_code == 200
        assert await answering_model(client, "support") != first
        assert (await load(client, "fresh", two, load_inplace=True)).status_code == 200, "as in vLLM"


async def test_two_loads_of_one_name_at_once_leave_one_winner(tmp_path: Path) -> None:
    async with importing_service(tmp_path) as (client, _, _engine):
        paths = [write_adapter(tmp_path / "imports" / str(n), tensors=adapter_tensors(seed=n)) for n in range(4)]
        answers = await asyncio.gather(*(load(client, "support", path) for path in paths))
        assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]


async def test_a_name_that_somebody_else_set_while_the_adapter_loaded_keeps_its_meaning(tmp_path: Path) -> None:
    async with importing_service(tmp_path) as (client, _, engine):
        path = write_adapter(tmp_path / "imports" / "one")
        await load(client, "other", write_adapter(tmp_path / "imports" / "other", tensors=adapter_tensors(seed=2)))
        other = await answering_model(client, "other")
        engine.load_gate.clear()
        loading = asyncio.create_task(load(client, "support", path))
        await eventually(lambda: engine.loading > 0)
        assert (await client.put("/v1/aliases/support", json={"revision": other})).status_code == 200
        engine.load_gate.set()
        late = await loading
        assert (late.status_code, late.json()["error"]["code"]) == (400, "already_loaded")
        assert await answering_model(client, "support") == other


async def test_unloading_spares_what_another_alias_or_a_pin_serves(tmp_path: Path) -> None:
    async with importing_service(tmp_path) as (client, service, engine):
        for name in ("shared", "pinned"):
            path = write_adapter(tmp_path / "imports" / name, tensors=adapter_tensors(seed=len(name)))
            assert (await load(client, name, path)).status_code == 200
        revisions = {name: await answering_model(client, name) for name in ("shared", "pinned")}
        await service.aliases.set("other", revisions["shared"])
        await service.pin(revisions["pinned"])
        for name in ("shared", "pinned"):
            assert (await unload(client, name)).status_code == 200
        await asyncio.sleep(0.1)
        assert {adapter.name for adapter in engine.loaded.values()} == set(revisions.values())


async def test_the_calls_are_refused_where_no_folder_is_set_and_say_how_to_enable_them(tmp_path: Path) -> None:
    async with importing_service(tmp_path, import_dir=None) as (client, _, _engine):
        for response in (await load(client, "support", "x"), await unload(client, "support")):
            assert response.status_code == 403
            assert "--import-dir" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "x/../../outside",
        "/etc",
        "/",
        "",
        ".",
        "OUTSIDE",
        "IMPORTS/../outside",
        "IMPORTS",
        "link",
        "folder-link/adapter",
        "adapter/adapter_config.json",
        "a\0b",
        "x" * 300,
    ],
)
async def test_nothing_outside_the_folder_is_ever_imported(tmp_path: Path, path: str) -> None:
    async with importing_service(tmp_path) as (client, service, _engine):
        outside = write_adapter(tmp_path / "outside")
        imports = tmp_path / "imports"
        write_adapter(imports / "adapter")
        (imports / "x").mkdir()
        (imports / "link").symlink_to(outside)
        (imports / "folder-link").symlink_to(imports)
        given = path.replace("OUTSIDE", str(outside)).replace("IMPORTS", str(imports))
        response = await load(client, "support", given)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "path_not_allowed"
        assert service.catalog.registry.artifacts() == []
        assert (await load(client, "support", "missing")).status_code == 404


@pytest.mark.parametrize("kind", ["link", "hard link", "pickle", "fifo"])
async def test_an_adapter_is_made_of_plain_files_only(tmp_path: Path, kind: str) -> None:
    async with importing_service(tmp_path) as (client, service, _engine):
        directory = write_adapter(tmp_path / "imports" / "adapter")
        weights, secret = directory / "adapter_model.safetensors", tmp_path / "secret"
        weights.rename(directory / "adapter_model.bin" if kind == "pickle" else secret)
        match kind:
            case "link":
                weights.symlink_to(secret)
            case "hard link":
                weights.hardlink_to(secret)
            case "fifo":
                os.mkfifo(weights)
        response = await load(client, "support", directory)
        assert response.status_code == 400
        assert response.json()["error"]["code"] in (
            "links_not_allowed",
            "special_file_not_allowed",
            "pickle_not_allowed",
        )
        assert service.catalog.registry.artifacts() == []


def test_a_directory_that_is_swapped_after_it_was_opened_is_not_what_is_read(tmp_path: Path) -> None:
    imports, outside = tmp_path / "imports", tmp_path / "outside"
    (imports / "team" / "adapter").mkdir(parents=True)
    (imports / "team" / "adapter" / "who").write_text("inside")
    (outside / "adapter").mkdir(parents=True)
    (outside / "adapter" / "who").write_text("outside")
    with ImportFolder(imports).open("team/adapter") as directory:
        (imports / "team").rename(imports / "moved")
        (imports / "team").symlink_to(outside)
        assert (directory / "who").read_text() == "inside"


def test_a_folder_reached_by_the_operators_own_link_is_fine_and_one_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "real" / "adapter").mkdir(parents=True)
    (tmp_path / "imports").symlink_to(tmp_path / "real")
    folder = ImportFolder(tmp_path / "imports")
    for path in ("adapter", str(tmp_path / "imports" / "adapter"), str(tmp_path / "real" / "adapter")):
        with folder.open(path) as directory:
            assert directory.is_dir()
    with pytest.raises(errors.StorageError), ImportFolder(tmp_path / "nowhere").open("adapter"):
        pass


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": BASE}, "lora_name"),
        ({"lora_name": "ft:capo-tiny:capo::a1"}, "lora_name"),
        ({"lora_name": "support@12345678"}, "lora_name"),
        ({"lora_name": "Support"}, "lora_name"),
        ({"lora_name": ""}, "lora_name"),
        ({"lora_name": 7}, "lora_name"),
        ({"load_inplace": "yes"}, "load_inplace"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"base_model_name": "x"}, "base_model_name"),
        ({"lora_path": None}, "lora_path"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(tmp_path: Path, body: dict[str, Any], param: str) -> None:
    async with importing_service(tmp_path) as (client, service, _engine):
        write_adapter(tmp_path / "imports" / "adapter")
        given = {"lora_name": "support", "lora_path": "adapter"} | body
        response = await client.post("/v1/load_lora_adapter", json=given)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert service.catalog.registry.artifacts() == []


async def test_unload_takes_a_name_and_nothing_else(tmp_path: Path) -> None:
    async with importing_service(tmp_path) as (client, _, _engine):
        write_adapter(tmp_path / "imports" / "adapter")
        await load(client, "support", "adapter")
        assert (await unload(client, "support", lora_int_id=3)).status_code == 400
        assert (await unload(client, "support", lora_int_id=None)).status_code == 200


def poison(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


async def test_weights_that_the_gate_refuses_leave_the_name_as_it_was(tmp_path: Path) -> None:
    async with importing_service(tmp_path) as (client, _, _engine):
        good = write_adapter(tmp_path / "imports" / "good")
        await load(client, "support", good)
        before = await answering_model(client, "support")
        bad = write_adapter(tmp_path / "imports" / "bad", change=poison)
        large = write_adapter(tmp_path / "imports" / "large", tensors=adapter_tensors(rank=32), r=32)
        for path, code in ((bad, "not_finite"), (large, "rank_too_large")):
            response = await load(client, "support", path, load_inplace=True)
            assert (response.status_code, response.json()["error"]["code"]) == (400, code)
        assert await answering_model(client, "support") == before

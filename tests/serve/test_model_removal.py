"""``DELETE /v1/models/{model}`` through HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from registry import CanaryRequest, Registry
from registry.principal import Principal, acting_as
from serve.catalog import Catalog
from serve.model_removal import remove_model
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, TENANT, publish, running_service

FT = "ft:capo-tiny:capo:support:abcd1234"


async def delete(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.delete(f"/v1/models/{model}")


async def test_the_stock_sdk_deletes_a_fine_tuned_model_and_its_files(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support", fine_tuned_name=FT)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0)
        deleted = await sdk.models.delete(FT)
        assert type(deleted).model_validate_json(deleted.to_json(), strict=True).deleted
        assert (deleted.id, deleted.object) == (FT, "model")
        assert [model.id async for model in sdk.models.list()] == [BASE]
        with pytest.raises(openai.NotFoundError):
            await sdk.models.delete(FT)
        await sdk.close()
    assert registry.artifacts() == []
    assert not artifact.path.exists()


async def test_an_artifact_that_another_name_serves_stays(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support", alias="help", fine_tuned_name=FT)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        assert (await delete(client, FT)).status_code == 200
        models = {model["id"] for model in (await client.get("/v1/models")).json()["data"]}
        assert models == {BASE, "help"}
        refused = await delete(client, artifact.revision)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "artifact_in_use")
        assert (await delete(client, "help")).status_code == 200
    assert registry.artifacts() == []


async def test_what_goes_is_what_the_name_meant_last_however_old_the_catalogs_picture_is(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    before = publish(registry, "support", "one", alias="help")
    meant, canary = publish(registry, "support", "two"), publish(registry, "support", "three")
    catalog = Catalog(registry, BASE)
    await catalog.refresh()
    Registry(tmp_path).set_alias("help", meant.revision, canary=CanaryRequest(canary.revision, 10))
    assert [artifact.revision for artifact in await catalog.served_by("help")] == [before.revision], "not seen yet"
    with acting_as(Principal.local(TENANT)):
        await remove_model(catalog, "help")
    assert [artifact.revision for artifact in registry.artifacts()] == [before.revision]


@pytest.mark.parametrize("digits", [8, 20, 64])
async def test_a_revision_is_deleted_by_any_prefix_of_its_digest(tmp_path: Path, digits: int) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support")
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        assert (await delete(client, f"support@{artifact.digest[:digits]}")).status_code == 200
    assert registry.artifacts() == []


@pytest.mark.parametrize("digits", [8, 20, 64, None], ids=str)
async def test_a_base_of_the_registry_is_never_deleted_by_any_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: int | None
) -> None:
    """As with ``capo serve --model merged-support@…``, whose revision is the base's id."""
    registry = Registry(tmp_path)
    base, other = publish(registry, "merged", alias="front"), publish(registry, "other")
    monkeypatch.setattr("tests.serve.running.BASE", base.revision)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        name = "front" if digits is None else f"merged@{base.digest[:digits]}"
        refused = await delete(client, name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "base_model")
        registry.set_alias("new", other.revision, canary=CanaryRequest(base.revision, 10))
        assert (await delete(client, "new")).status_code == 200, "the base is its canary, and stays"
    assert registry.artifacts() == [base]


async def test_the_base_is_never_deleted(tmp_path: Path) -> None:
    Registry(tmp_path)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        refused = await delete(client, BASE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "base_model")

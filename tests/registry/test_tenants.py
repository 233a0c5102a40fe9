"""A registry on behalf of a tenant: what it sees, what it publishes, and what it may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import Artifact, CanaryRequest, ManifestDraft, Registry
from registry.errors import ConflictError, InvalidRequestError, ModelNotFoundError, PermissionDeniedError
from registry.principal import Principal
from tests.registry.samples import draft

ACME = Principal("acme", None, frozenset())
UMBRELLA = Principal("umbrella", None, frozenset())
HOUSE = Principal.local("house")


def published(registry: Registry, content: str, **options: str) -> Artifact:
    with registry.stage() as folder:
        (folder / "weights.safetensors").write_text(content)
        return registry.publish(folder, draft("support"), **options)


@pytest.fixture
def everything(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_what_a_tenant_publishes_is_its_own_and_not_there_for_another(everything: Registry) -> None:
    acme, umbrella = everything.on_behalf_of(ACME), everything.on_behalf_of(UMBRELLA)
    theirs = published(acme, "theirs", alias="front", fine_tuned_name="ft:base:acme:x:12345678")
    assert theirs.manifest.tenant == everything.alias("front").tenant == "acme"
    assert acme.resolve("front") == everything.resolve("front") == theirs
    for name in ("front", theirs.revision, "ft:base:acme:x:12345678"):
        with pytest.raises(ModelNotFoundError):
            umbrella.resolve(name)
    with pytest.raises(ModelNotFoundError):
        umbrella.alias("front")
    assert umbrella.artifacts() == umbrella.aliases() == []
    for change in (umbrella.rollback_alias, umbrella.remove_alias):
        with pytest.raises(ModelNotFoundError):
            change("front")
    with pytest.raises(ModelNotFoundError):
        umbrella.remove(theirs.revision, force=True)
    assert everything.resolve("front") == theirs


def test_the_same_bytes_of_two_tenants_are_two_artifacts(everything: Registry) -> None:
    theirs = published(everything.on_behalf_of(ACME), "equal")
    own = published(everything.on_behalf_of(UMBRELLA), "equal")
    assert theirs.digest != own.digest
    assert everything.on_behalf_of(UMBRELLA).artifacts() == [own]


def test_a_name_that_another_tenant_has_is_taken_and_keeps_its_meaning(everything: Registry) -> None:
    theirs = published(everything.on_behalf_of(ACME), "theirs", alias="front")
    umbrella = everything.on_behalf_of(UMBRELLA)
    own = published(umbrella, "own")
    with pytest.raises(ConflictError) as caught:
        umbrella.set_alias("front", own.revision)
    assert caught.value.code == "alias_taken"
    with pytest.raises(ConflictError):
        published(umbrella, "another", alias="front")
    assert everything.resolve("front") == theirs


def test_what_all_share_is_seen_by_all_and_changed_by_the_house_alone(everything: Registry) -> None:
    common = published(everything, "common", alias="front")
    assert common.manifest.tenant is None
    acme, house = everything.on_behalf_of(ACME), everything.on_behalf_of(HOUSE)
    own = published(acme, "own")
    assert acme.resolve("front") == common
    for change in (
        lambda: acme.set_alias("front", own.revision),
        lambda: acme.remove_alias("front"),
        lambda: acme.rollback_alias("front"),
        lambda: acme.remove(common.revision, force=True),
    ):
        with pytest.raises(PermissionDeniedError) as caught:
            change()
        assert caught.value.code == "shared_model"
    mine = acme.set_alias("mine", common.revision)
    assert mine.tenant == "acme", "a tenant's own name for what is shared is its own"
    house.remove_alias("front")
    with pytest.raises(ModelNotFoundError):
        acme.alias("front")


def test_an_alias_serves_the_models_of_one_tenant(everything: Registry) -> None:
    theirs, own = published(everything.on_behalf_of(ACME), "a"), published(everything.on_behalf_of(UMBRELLA), "b")
    common = published(everything, "c")
    with pytest.raises(InvalidRequestError, match="another tenant"):
        everything.set_alias("front", theirs.revision, canary=CanaryRequest(own.revision, 10))
    mixed = everything.set_alias("front", common.revision, canary=CanaryRequest(own.revision, 10))
    assert mixed.tenant == "umbrella", "else everybody would get its canary"


def test_a_result_is_named_by_its_own_tenant_alone(everything: Registry) -> None:
    """Who was let use a model by its name would else get a stranger's once it is deleted."""
    name = "ft:base:acme:x:12345678"
    acme, umbrella = everything.on_behalf_of(ACME), everything.on_behalf_of(UMBRELLA)
    published(acme, "theirs", fine_tuned_name=name)
    acme.remove_named(name)
    own = published(umbrella, "own")
    for change in (
        lambda: umbrella.set_alias(name, own.revision),
        lambda: umbrella.check_alias(name, own.revision),
        lambda: published(umbrella, "another", fine_tuned_name=name),
    ):
        with pytest.raises(PermissionDeniedError) as caught:
            change()
        assert caught.value.code == "foreign_organization"
    assert everything.aliases() == []


def test_what_was_shared_is_shared_again_when_it_is_rolled_back(everything: Registry) -> None:
    common, house = published(everything, "common", alias="front"), everything.on_behalf_of(HOUSE)
    own, later = published(house, "own"), published(house, "later")
    acme = everything.on_behalf_of(ACME)
    house.set_alias("front", own.revision)
    house.set_alias("front", later.revision)
    with pytest.raises(ModelNotFoundError):
        acme.resolve("front")
    house.rollback_alias("front")
    assert everything.alias("front").tenant == "house"
    house.rollback_alias("front")
    assert acme.resolve("front") == common

    for end in (lambda: house.rollback_alias("front"), lambda: house.remove(own.revision, force=True)):
        house.set_alias("front", common.revision, canary=CanaryRequest(own.revision, 5))
        with pytest.raises(ModelNotFoundError):
            acme.resolve("front")
        end()
        assert acme.resolve("front") == common


def test_a_tenants_own_name_for_what_is_shared_stays_its_own(everything: Registry) -> None:
    common, acme = published(everything, "common"), everything.on_behalf_of(ACME)
    own = published(acme, "own")
    acme.set_alias("mine", common.revision)
    acme.set_alias("mine", own.revision)
    assert acme.rollback_alias("mine").tenant == "acme"
    acme.set_alias("mine", common.revision, canary=CanaryRequest(own.revision, 10))
    assert acme.rollback_alias("mine").tenant == "acme"


def test_without_a_principal_names_are_what_they_were(everything: Registry, tmp_path: Path) -> None:
    first = published(everything, "one", alias="front")
    record = everything.alias("front")
    assert record.tenant is None
    stored = next((tmp_path / "registry" / "aliases").glob("*.json")).read_text()
    assert "tenant" not in stored, "an older Capo reads it"
    assert ManifestDraft.model_fields["tenant"].default is None
    assert first.manifest.tenant is None

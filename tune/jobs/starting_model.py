"""What ``model`` of a new job means: a base model, or a fine-tuned model of this service to go on from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from registry import Artifact, FineTunedName, Registry, parse_reference
from registry.errors import InvalidNameError, InvalidRequestError, ModelNotFoundError
from tune.jobs.permissions.store import PermissionStore


@dataclass(frozen=True, slots=True)
class StartingModel:
    base: str
    """The base model's id."""
    adapter: Artifact | None
    """``None``: the base alone."""


def base_of(model: str) -> str:
    """The base model's id, of a job's ``model`` that was accepted."""
    if not model.startswith("ft:"):
        return model
    name = parse_reference(model)
    assert isinstance(name, FineTunedName), name
    return name.base


def starting_model(
    model: str,
    bases: Collection[str],
    *,
    registry: Registry,
    tenant: str,
    permissions: PermissionStore,
) -> StartingModel:
    """Find what a tenant's job starts from. Blocks on the registry's disk.

    Raises:
        InvalidRequestError: it is no base of this server, and no fine-tuned model of one that the tenant may use.
    """
    if model in bases:
        return StartingModel(model, None)
    offered = ", ".join(sorted(bases)) or "none"
    try:
        name = parse_reference(model)
        if not isinstance(name, FineTunedName):
            raise _refused(model, f"is neither a base model of this server nor an ft: name; base models: {offered}")
        artifact = registry.resolve(model)
        is_own = artifact.manifest.tenant in (None, tenant)
        if not is_own and not permissions.is_shared_with(model, tenant):
            raise _refused(model, f"does not exist; base models: {offered}")
    except InvalidNameError as error:
        raise _refused(model, f"is not a base model of this server; base models: {offered}") from error
    except ModelNotFoundError as error:
        raise _refused(model, f"does not exist; base models: {offered}") from error
    if name.base not in bases or artifact.manifest.base_model.id != name.base:
        trained_on = artifact.manifest.base_model.id
        raise _refused(model, f"belongs to the base {trained_on!r}, which is not trained on here; offered: {offered}")
    if artifact.manifest.kind != "lora":
        raise _refused(model, "is a whole model, and only adapters are trained on")
    return StartingModel(name.base, artifact)


def _refused(model: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"model {model[:200]!r} {reason}", code="model_not_available", param="model")

"""Going on from an adapter: what it decides about a run. Imports no torch."""

from __future__ import annotations

from typing import Any, TypeAlias

from registry import Artifact, BaseModelIdentity
from registry.adapter_config import AdapterConfig, read_adapter_config
from registry.errors import InvalidRequestError
from tune.methods import LoraMethod, QloraMethod

StartableMethod: TypeAlias = LoraMethod | QloraMethod


def check_base(start: Artifact, base: BaseModelIdentity) -> None:
    """Raises :class:`InvalidRequestError` unless ``start`` is an adapter of exactly this base."""
    manifest = start.manifest
    if manifest.kind != "lora":
        raise InvalidRequestError(
            f"start_from={start.revision!r} is a whole model ({manifest.kind}), not an adapter; give it as base_model",
            code="not_an_adapter",
            param="start_from",
        )
    found = manifest.base_model.fingerprint
    if found is None or found != base.fingerprint:
        known = "unknown" if found is None else f"{manifest.base_model.id} ({found[:16]})"
        raise InvalidRequestError(
            f"start_from={start.revision!r} was trained on another base: its own is {known}, and the run's is "
            f"{base.id} ({str(base.fingerprint)[:16]}); an adapter goes on only on its own base",
            code="wrong_base",
            param="start_from",
        )


def started_method(asked: StartableMethod, start: Artifact) -> StartableMethod:
    """``asked`` with the shape of the adapter ``start``, from which training goes on.

    Raises:
        InvalidRequestError: the method asks for another shape, or the adapter has one that no method can say.
    """
    shape = _shape(start, read_adapter_config(start.path))
    for name in asked.model_fields_set & shape.keys():
        wanted, given = getattr(asked, name), shape[name]
        if _comparable(wanted) != _comparable(given):
            raise InvalidRequestError(
                f"method.{name}={wanted!r} was asked for, and {start.revision}, from which training goes on, has "
                f"{given!r}; an adapter keeps its shape: leave {name} out, or start from the base",
                code="shape_is_fixed",
                param=f"method.{name}",
            )
    if asked.init != "default":
        raise InvalidRequestError(
            f"method.init={asked.init!r} chooses starting values, and start_from={start.revision!r} has them; leave "
            "one of them out",
            code="shape_is_fixed",
            param="method.init",
        )
    return asked.model_copy(update=shape)


def _shape(start: Artifact, config: AdapterConfig) -> dict[str, Any]:
    if isinstance(config.target_modules, str) or config.layers_to_transform is not None or config.has_exclusions:
        raise _cannot_go_on(start, "chooses its layers by an expression or by number")
    alphas = (config.alpha, *config.alpha_pattern.values())
    if any(alpha != int(alpha) or alpha < 1 for alpha in alphas):
        raise _cannot_go_on(start, f"is scaled by an alpha that is no whole number ({config.alpha:g})")
    return {
        "rank": config.rank,
        "alpha": int(config.alpha),
        "target_modules": tuple(sorted({name.rsplit(".", 1)[-1] for name in config.target_modules})),
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: int(alpha) for key, alpha in config.alpha_pattern.items()},
    }


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def _cannot_go_on(start: Artifact, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"start_from={start.revision!r} {reason}, which no method of Capo does; merge it into its base and train on "
        "that",
        code="adapter_cannot_go_on",
        param="start_from",
    )

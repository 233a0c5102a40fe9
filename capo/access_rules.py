"""The one table of who may ask for what, for both faces. What does not stand here is refused.

``tests/capo/test_access_matrix.py`` walks the composed application and the gRPC server and fails for anything that is
served and not in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.principal import Scope


@dataclass(frozen=True, slots=True)
class Rule:
    """A key with one of these scopes may; none: everybody may, without a key."""

    scopes: frozenset[Scope]
    is_admin_act: bool = False
    """Changes what others meet, so it stands in the audit log."""
    is_refused_while_draining: bool = True
    """False: what a service that ends still answers; and inference, which refuses, counts and waits for its own."""
    is_endless: bool = False
    """Streams for as long as its client likes."""

    @property
    def is_public(self) -> bool:
        return not self.scopes

    @property
    def is_awaited_by_a_drain(self) -> bool:
        """Whether the service ends only when such requests have, or its deadline has come."""
        return self.is_refused_while_draining and not self.is_endless


_PUBLIC = Rule(frozenset(), is_refused_while_draining=False)
_ANY = Rule(frozenset(Scope))
_ANY_TALK = Rule(frozenset(Scope), is_endless=True)
_INFER = Rule(frozenset({Scope.INFER}), is_refused_while_draining=False)
_TUNE = Rule(frozenset({Scope.TUNE}))
_FOLLOW_JOB = Rule(frozenset({Scope.TUNE}), is_endless=True)
_ADMIN = Rule(frozenset({Scope.ADMIN}))
_ADMIN_ACT = Rule(frozenset({Scope.ADMIN}), is_admin_act=True)
_METRICS = Rule(frozenset({Scope.METRICS}), is_refused_while_draining=False)
_MODELS = Rule(frozenset({Scope.INFER, Scope.TUNE, Scope.ADMIN}))
_DELETE_MODEL = Rule(frozenset({Scope.TUNE, Scope.ADMIN}), is_admin_act=True)

_PERMISSIONS = "/v1/fine_tuning/checkpoints/{model:path}/permissions"

HTTP_RULES: Mapping[str, Rule] = {
    "GET /livez": _PUBLIC,
    "GET /readyz": _PUBLIC,
    "GET /startupz": _PUBLIC,
    "GET /openapi.json": _ANY,
    "GET /metrics": _METRICS,
    "POST /v1/chat/completions": _INFER,
    "POST /v1/completions": _INFER,
    "POST /v1/responses": _INFER,
    "POST /tokenize": _INFER,
    "POST /detokenize": _INFER,
    "GET /v1/models": _MODELS,
    "GET /v1/models/{model:path}": _MODELS,
    "DELETE /v1/models/{model:path}": _DELETE_MODEL,
    "GET /v1/adapters": _ADMIN,
    "GET /v1/pins": _ADMIN,
    "PUT /v1/adapters/{reference:path}/pin": _ADMIN_ACT,
    "DELETE /v1/adapters/{reference:path}/pin": _ADMIN_ACT,
    "GET /v1/aliases": _ADMIN,
    "GET /v1/aliases/{alias:path}": _ADMIN,
    "PUT /v1/aliases/{alias:path}": _ADMIN_ACT,
    "POST /v1/aliases/{alias:path}/rollback": _ADMIN_ACT,
    "DELETE /v1/aliases/{alias:path}": _ADMIN_ACT,
    "POST /v1/load_lora_adapter": _ADMIN_ACT,
    "POST /v1/unload_lora_adapter": _ADMIN_ACT,
    "POST /v1/files": _TUNE,
    "GET /v1/files": _TUNE,
    "GET /v1/files/{file_id}": _TUNE,
    "GET /v1/files/{file_id}/content": _TUNE,
    "DELETE /v1/files/{file_id}": _TUNE,
    "POST /v1/uploads": _TUNE,
    "POST /v1/uploads/{upload_id}/parts": _TUNE,
    "POST /v1/uploads/{upload_id}/complete": _TUNE,
    "POST /v1/uploads/{upload_id}/cancel": _TUNE,
    "POST /v1/fine_tuning/jobs": _TUNE,
    "GET /v1/fine_tuning/jobs": _TUNE,
    "GET /v1/fine_tuning/jobs/{job_id}": _TUNE,
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": _TUNE,
    "POST /v1/fine_tuning/jobs/{job_id}/pause": _TUNE,
    "POST /v1/fine_tuning/jobs/{job_id}/resume": _TUNE,
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": _TUNE,
    "GET /v1/fine_tuning/jobs/{job_id}/events": _TUNE,
    "POST /v1/fine_tuning/alpha/graders/run": _TUNE,
    "POST /v1/fine_tuning/alpha/graders/validate": _TUNE,
    f"POST {_PERMISSIONS}": _ADMIN_ACT,
    f"GET {_PERMISSIONS}": _ADMIN,
    f"DELETE {_PERMISSIONS}/{{permission_id}}": _ADMIN_ACT,
    "POST /v1/webhook_endpoints": _ADMIN_ACT,
    "GET /v1/webhook_endpoints": _ADMIN,
    "GET /v1/webhook_endpoints/{endpoint_id}": _ADMIN,
    "DELETE /v1/webhook_endpoints/{endpoint_id}": _ADMIN_ACT,
}
"""By method and path, as the routers write them. A HEAD is asked for as a GET."""

GRPC_RULES: Mapping[str, Rule] = {
    "/grpc.health.v1.Health/Check": _PUBLIC,
    "/grpc.health.v1.Health/List": _PUBLIC,
    "/grpc.health.v1.Health/Watch": _PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY_TALK,
    "/capo.v1.Inference/Chat": _INFER,
    "/capo.v1.Inference/ChatStream": _INFER,
    "/capo.v1.Inference/Complete": _INFER,
    "/capo.v1.Inference/CompleteStream": _INFER,
    "/capo.v1.Inference/ListModels": _MODELS,
    "/capo.v1.Tuning/CreateJob": _TUNE,
    "/capo.v1.Tuning/GetJob": _TUNE,
    "/capo.v1.Tuning/ListJobs": _TUNE,
    "/capo.v1.Tuning/CancelJob": _TUNE,
    "/capo.v1.Tuning/PauseJob": _TUNE,
    "/capo.v1.Tuning/ResumeJob": _TUNE,
    "/capo.v1.Tuning/FollowJob": _FOLLOW_JOB,
    "/capo.v1.Adapters/ListAdapters": _ADMIN,
    "/capo.v1.Adapters/ListPins": _ADMIN,
    "/capo.v1.Adapters/PinAdapter": _ADMIN_ACT,
    "/capo.v1.Adapters/UnpinAdapter": _ADMIN_ACT,
    "/capo.v1.Adapters/ListAliases": _ADMIN,
    "/capo.v1.Adapters/GetAlias": _ADMIN,
    "/capo.v1.Adapters/SetAlias": _ADMIN_ACT,
    "/capo.v1.Adapters/RollbackAlias": _ADMIN_ACT,
    "/capo.v1.Adapters/RemoveAlias": _ADMIN_ACT,
}

RULES: Mapping[str, Rule] = {**HTTP_RULES, **GRPC_RULES}

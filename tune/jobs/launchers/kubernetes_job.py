"""The batch/v1 Job in which one training job is worked, as restricted as Pod Security Standards ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune.jobs.settings import STOP_GRACE_SECONDS

JOB_LABEL = "capo/job"
MANAGED_BY = "app.kubernetes.io/managed-by"
SELECTOR = f"{MANAGED_BY}=capo,app.kubernetes.io/component=training"
DATA_PATH = "/data"
SECRETS_PATH = "/run/secrets/capo"
_LONGEST_LABEL = 63
_END_SECONDS = 15
"""For a worker to write how its job stands and to end, once the training process has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """What the Jobs are made of."""

    image: str
    """Its entrypoint is ``capo``, and it runs as a user that is not root."""
    volume_claim: str
    """The PersistentVolumeClaim with the data directory, which control process and workers share."""
    secret: str | None = None
    """A Secret whose keys the workers find as files in :data:`SECRETS_PATH`: the job store's URL holds a password."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More of it, with nothing secret."""
    cpu: str = "2"
    memory: str = "8Gi"
    """Requested and allowed: a worker that is given less than it may use is killed when the node runs out."""
    gpu_resource: str = "nvidia.com/gpu"
    user_id: int = 10001
    """Owns what the workers write; the image's user."""
    kept_seconds: int = 3600
    """How long an ended Job stays to be looked at."""
    stop_grace_seconds: float = STOP_GRACE_SECONDS
    """What a worker gives its training process to stop with a checkpoint."""


def job_manifest(settings: KubernetesSettings, name: str, *, job_id: str, tenant: str, gpus: int) -> dict[str, Any]:
    labels = {
        "app.kubernetes.io/name": "capo",
        "app.kubernetes.io/component": "training",
        MANAGED_BY: "capo",
        JOB_LABEL: job_id,
        "capo/tenant": _label(tenant),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            # How often a job is tried is for Capo to say, which knows a fault of the data from a lost machine.
            "backoffLimit": 0,
            # A pod that was drained or preempted has no fault: another one goes on from the checkpoint.
            "podFailurePolicy": {
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            # Not while the old pod may still run: it has the job's directory.
            "podReplacementPolicy": "Failed",
            "ttlSecondsAfterFinished": settings.kept_seconds,
            "template": {"metadata": {"labels": labels}, "spec": _pod(settings, job_id, gpus)},
        },
    }


def _pod(settings: KubernetesSettings, job_id: str, gpus: int) -> dict[str, Any]:
    resources = {"cpu": settings.cpu, "memory": settings.memory}
    if gpus:
        resources[settings.gpu_resource] = str(gpus)
    environment = {"CAPO_DATA_DIR": DATA_PATH, **settings.environment}
    mounts: list[dict[str, Any]] = [
        {"name": "data", "mountPath": DATA_PATH},
        # What else may be written to: the image keeps libraries' caches in the first.
        {"name": "cache", "mountPath": "/cache"},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": settings.volume_claim}},
        {"name": "cache", "emptyDir": {"sizeLimit": "8Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
        # PyTorch's data loaders share memory there; what they take counts as the pod's.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    if settings.secret is not None:
        environment["CAPO_SECRETS_DIR"] = SECRETS_PATH
        mounts.append({"name": "secrets", "mountPath": SECRETS_PATH, "readOnly": True})
        volumes.append({"name": "secrets", "secret": {"secretName": settings.secret, "defaultMode": 0o440}})
    container: dict[str, Any] = {
        "name": "worker",
        "image": settings.image,
        "args": ["worker", "--job", job_id, "--gpus", str(gpus)],
        "env": [{"name": key, "value": value} for key, value in sorted(environment.items())],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(settings.stop_grace_seconds) + _END_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user_id,
            "runAsGroup": settings.user_id,
            "fsGroup": settings.user_id,
            # Else every start would walk through the whole data directory.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }


def _label(text: str) -> str:
    """``text`` as a label's value may be: up to 63 letters, digits, ``-``, ``_`` and ``.``, and no sign at its ends."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:_LONGEST_LABEL].strip("-_.")

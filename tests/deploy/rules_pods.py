"""Rules about pods by themselves: restricted, images by digest, secrets as files, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import ValidationError

from capo.settings import Settings
from tests.deploy.render import Pod, Render
from tests.deploy.rules import pod_rule, rule, serving

# -- restricted pods (https://kubernetes.io/docs/concepts/security/pod-security-standards/) --------------------------


@pod_rule
def pods_run_as_a_user_that_is_not_root(pod: Pod) -> bool:
    return pod.spec["securityContext"].get("runAsNonRoot") is True


@pod_rule
def the_user_is_a_fixed_number(pod: Pod) -> bool:
    return pod.spec["securityContext"].get("runAsUser", 0) > 0 and pod.spec["securityContext"].get("runAsGroup", 0) > 0


@pod_rule
def no_container_chooses_another_user(pod: Pod) -> bool:
    return all("runAsUser" not in c["securityContext"] for c in pod.spec["containers"])


@pod_rule
def volumes_belong_to_the_pods_group(pod: Pod) -> bool:
    context = pod.spec["securityContext"]
    return context.get("fsGroup") == context["runAsGroup"] and context.get("fsGroupChangePolicy") == "OnRootMismatch"


@pod_rule
def system_calls_are_filtered(pod: Pod) -> bool:
    return pod.spec["securityContext"].get("seccompProfile") == {"type": "RuntimeDefault"}


@pod_rule
def privileges_cannot_grow(pod: Pod) -> bool:
    return all(c["securityContext"].get("allowPrivilegeEscalation") is False for c in pod.spec["containers"])


@pod_rule
def all_capabilities_are_dropped(pod: Pod) -> bool:
    return all(c["securityContext"].get("capabilities") == {"drop": ["ALL"]} for c in pod.spec["containers"])


@pod_rule
def root_file_systems_are_read_only(pod: Pod) -> bool:
    return all(c["securityContext"].get("readOnlyRootFilesystem") is True for c in pod.spec["containers"])


@pod_rule
def no_container_is_privileged(pod: Pod) -> bool:
    return not any(c["securityContext"].get("privileged") for c in pod.spec["containers"])


@pod_rule
def pods_share_nothing_with_their_node(pod: Pod) -> bool:
    return not any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


@pod_rule
def volumes_are_of_the_kinds_that_restricted_pods_may_have(pod: Pod) -> bool:
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"}
    return all(set(volume) - {"name"} <= allowed for volume in pod.spec["volumes"])


@pod_rule
def containers_open_no_port_of_the_node(pod: Pod) -> bool:
    return not any("hostPort" in port for c in pod.spec["containers"] for port in c.get("ports", []))


@pod_rule
def every_pod_has_an_account_of_its_own(pod: Pod) -> bool:
    return pod.spec.get("serviceAccountName", "default") != "default"


@pod_rule
def only_a_launcher_gets_a_token_of_the_api(pod: Pod) -> bool:
    return pod.spec.get("automountServiceAccountToken") is (pod.environment("CAPO_LAUNCHER") == "kubernetes")


@pod_rule
def services_are_not_put_into_the_environment(pod: Pod) -> bool:
    return pod.spec.get("enableServiceLinks") is False


@rule
def accounts_hand_out_no_token_by_themselves(render: Render) -> Iterator[str]:
    yield from (
        o["metadata"]["name"] for o in render.of("ServiceAccount") if o.get("automountServiceAccountToken") is not False
    )


@rule
def accounts_that_pods_name_exist(render: Render) -> Iterator[str]:
    known = {o["metadata"]["name"] for o in render.of("ServiceAccount")}
    yield from (pod.name for pod in render.pods() if pod.spec.get("serviceAccountName") not in known)


@rule
def the_namespace_enforces_restricted_pods(render: Render) -> Iterator[str]:
    labels = render.get("Namespace", "capo")["metadata"].get("labels", {})
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace"


@rule
def everything_is_in_the_namespace(render: Render) -> Iterator[str]:
    of_the_cluster = {"Namespace", "PriorityClass"}
    for item in render.objects:
        if item["kind"] not in of_the_cluster and item["metadata"].get("namespace") != "capo":
            yield item["metadata"]["name"]


@rule
def everything_carries_the_name(render: Render) -> Iterator[str]:
    for item in render.objects:
        if item["metadata"].get("labels", {}).get("app.kubernetes.io/name") != "capo":
            yield f"{item['kind']} {item['metadata']['name']}"


# -- images, secrets, settings --------------------------------------------------------------------------------------


@pod_rule
def images_are_named_by_digest(pod: Pod) -> bool:
    return all(re.fullmatch(r"[^@:]+/[^@:]+@sha256:[0-9a-f]{64}", c["image"]) for c in pod.spec["containers"])


@pod_rule
def secrets_are_files_and_not_environment(pod: Pod) -> bool:
    entries = [entry for c in pod.spec["containers"] for entry in c.get("env", [])]
    sources = [source for c in pod.spec["containers"] for source in c.get("envFrom", [])]
    named = any(re.search("PASSWORD|TOKEN|KEY|DATABASE_URL", e["name"]) and "_FILE" not in e["name"] for e in entries)
    return (
        not named
        and not any("secretKeyRef" in e.get("valueFrom", {}) for e in entries)
        and not any("secretRef" in source for source in sources)
    )


@pod_rule
def secrets_are_mounted_read_only_for_the_group_alone(pod: Pod) -> bool:
    names = {v["name"] for v in pod.spec["volumes"] if v.get("secret", {}).get("defaultMode") == 0o440}
    all_secrets = {v["name"] for v in pod.spec["volumes"] if "secret" in v}
    mounts = [m for c in pod.spec["containers"] for m in c["volumeMounts"] if m["name"] in all_secrets]
    return names == all_secrets and all(m.get("readOnly") is True for m in mounts)


@rule
def no_secret_lies_in_the_manifests(render: Render) -> Iterator[str]:
    yield from (o["metadata"]["name"] for o in render.of("Secret"))


@rule
def a_change_of_settings_is_a_rollout(render: Render) -> Iterator[str]:
    """The name of the ConfigMap ends in a hash of its content, and the pods name that."""
    for pod in render.capo_pods():
        names = [source["configMapRef"]["name"] for source in pod.container.get("envFrom", [])]
        known = {o["metadata"]["name"] for o in render.of("ConfigMap")}
        if not names or not set(names) <= known or not all(re.search("-[a-z0-9]{10}$", name) for name in names):
            yield pod.name


@rule
def settings_listen_on_the_ports_that_are_declared(render: Render) -> Iterator[str]:
    for pod in serving(render):
        settings = render.settings(pod)
        ports = {port["name"]: str(port["containerPort"]) for port in pod.container["ports"]}
        wanted = {name: settings.get(f"CAPO_{name.upper()}_PORT") for name in ("grpc", "metrics", "health")}
        if ports != {"http": settings.get("CAPO_PORT"), **wanted}:
            yield pod.name


@rule
def every_setting_is_one_that_capo_has(render: Render) -> Iterator[str]:
    """Capo leaves variables alone that it does not know, so a mistyped one would be lost in silence."""
    known = {f"CAPO_{name.upper()}" for name in Settings.model_fields} | {"CAPO_SECRETS_DIR"}
    for pod in render.capo_pods():
        yield from (
            f"{pod.name}: {name}" for name in render.settings(pod) if name.startswith("CAPO_") and name not in known
        )


@rule
def settings_are_values_that_capo_takes(render: Render) -> Iterator[str]:
    for pod in render.capo_pods():
        prefix = "CAPO_"
        given = {n.removeprefix(prefix).lower(): v for n, v in render.settings(pod).items() if n.startswith(prefix)}
        given.pop("secrets_dir", None)
        try:
            # The address of the job store is in a secret.
            Settings(**given, database_url="postgresql+psycopg://capo@db/capo")  # type: ignore[arg-type]
        except ValidationError as error:
            yield f"{pod.name}: {error.errors()[0]['msg']}"


@rule
def without_keys_only_the_demo_listens(render: Render) -> Iterator[str]:
    for pod in serving(render):
        settings = render.settings(pod)
        if settings.get("CAPO_ALLOW_UNAUTHENTICATED") and settings.get("CAPO_MODEL") != "capo-tiny":
            yield pod.name


@rule
def the_halves_share_the_same_settings(render: Render) -> Iterator[str]:
    sources = {str(pod.container.get("envFrom")) for pod in render.capo_pods()}
    if len(sources) > 1:
        yield f"{len(sources)} sets of settings"


@rule
def secrets_lie_where_the_settings_look(render: Render) -> Iterator[str]:
    for pod in render.capo_pods():
        mount = pod.mounts().get(render.settings(pod).get("CAPO_SECRETS_DIR", ""))
        if mount is None or "secret" not in pod.volume(mount["name"]):
            yield pod.name


@rule
def a_shared_job_store_needs_its_secret(render: Render) -> Iterator[str]:
    for pod in render.capo_pods():
        optional = pod.volume("secrets")["secret"].get("optional", False)
        if bool(render.of("StatefulSet")) is bool(optional):
            yield pod.name


@rule
def every_role_is_one_that_capo_has(render: Render) -> Iterator[str]:
    roles = sorted(pod.environment("CAPO_ROLE") or "all" for pod in serving(render))
    if roles not in (["all"], ["control", "infer"]):
        yield f"roles {roles}"

"""Mistakes that people make in manifests, each put into a render that was good, with the rule that must see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.deploy.render import Object, Render

Damage = Callable[[Render], Any]


@dataclass(frozen=True)
class Defect:
    rule: str
    what: str
    damage: Damage
    overlay: str = "replicas"
    components: tuple[str, ...] = ()
    """Beside the overlay's own."""

    @property
    def name(self) -> str:
        return f"{self.rule}: {self.what}"


def serve(render: Render) -> Object:
    spec: Object = render.pod("capo-serve").spec
    return spec


def control(render: Render) -> Object:
    spec: Object = render.pod("capo-control").spec
    return spec


def container(render: Render, pod: str = "capo-serve") -> Object:
    return render.pod(pod).container


def drop(render: Render, kind: str, name: str) -> None:
    render.objects.remove(render.get(kind, name))


def volume(render: Render, pod: str, name: str) -> Object:
    return render.pod(pod).volume(name)


def policy(render: Render, name: str) -> Object:
    spec: Object = render.get("NetworkPolicy", name)["spec"]
    return spec


def setting(render: Render, name: str, value: str) -> None:
    render.get("ConfigMap", "capo-settings")["data"][name] = value


def environment(render: Render, pod: str, name: str, value: str) -> None:
    entries = container(render, pod).setdefault("env", [])
    entries[:] = [entry for entry in entries if entry["name"] != name] + [{"name": name, "value": value}]


def scaled(render: Render) -> Object:
    spec: Object = render.get("ScaledObject", "capo-serve")["spec"]
    return spec


DEFECTS: list[Defect] = [
    # pods
    Defect(
        "pods_run_as_a_user_that_is_not_root", "forgotten", lambda r: serve(r)["securityContext"].pop("runAsNonRoot")
    ),
    Defect("the_user_is_a_fixed_number", "root", lambda r: serve(r)["securityContext"].update(runAsUser=0)),
    Defect(
        "no_container_chooses_another_user",
        "root after all",
        lambda r: container(r)["securityContext"].update(runAsUser=0),
    ),
    Defect("volumes_belong_to_the_pods_group", "no fsGroup", lambda r: control(r)["securityContext"].pop("fsGroup")),
    Defect(
        "system_calls_are_filtered",
        "unconfined",
        lambda r: serve(r)["securityContext"]["seccompProfile"].update(type="Unconfined"),
    ),
    Defect(
        "privileges_cannot_grow",
        "left at its default",
        lambda r: container(r)["securityContext"].pop("allowPrivilegeEscalation"),
    ),
    Defect(
        "all_capabilities_are_dropped",
        "one added",
        lambda r: container(r)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
    ),
    Defect(
        "root_file_systems_are_read_only",
        "of PostgreSQL",
        lambda r: container(r, "capo-postgresql")["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    Defect(
        "no_container_is_privileged",
        "for the GPU",
        lambda r: container(r)["securityContext"].update(privileged=True),
        "gpu",
    ),
    Defect("pods_share_nothing_with_their_node", "hostIPC for shared memory", lambda r: serve(r).update(hostIPC=True)),
    Defect(
        "volumes_are_of_the_kinds_that_restricted_pods_may_have",
        "hostPath cache",
        lambda r: serve(r)["volumes"].append({"name": "c", "hostPath": {"path": "/models"}}),
    ),
    Defect("containers_open_no_port_of_the_node", "hostPort", lambda r: container(r)["ports"][0].update(hostPort=8000)),
    Defect("every_pod_has_an_account_of_its_own", "the default one", lambda r: serve(r).pop("serviceAccountName")),
    Defect(
        "only_a_launcher_gets_a_token_of_the_api",
        "replicas too",
        lambda r: serve(r).update(automountServiceAccountToken=True),
    ),
    Defect(
        "only_a_launcher_gets_a_token_of_the_api",
        "the launcher does not",
        lambda r: control(r).update(automountServiceAccountToken=False),
    ),
    Defect(
        "the_namespace_enforces_restricted_pods",
        "baseline",
        lambda r: r.get("Namespace", "capo")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        ),
    ),
    Defect(
        "everything_is_in_the_namespace",
        "a policy elsewhere",
        lambda r: r.get("NetworkPolicy", "default-deny")["metadata"].update(namespace="default"),
    ),
    # images, secrets, settings
    Defect(
        "images_are_named_by_digest", "latest", lambda r: container(r).update(image="registry.example.com/capo:latest")
    ),
    Defect(
        "secrets_are_files_and_not_environment",
        "the URL as a variable",
        lambda r: environment(r, "capo-control", "CAPO_DATABASE_URL", "postgresql://capo:secret@db/capo"),
    ),
    Defect(
        "secrets_are_mounted_read_only_for_the_group_alone",
        "readable for all",
        lambda r: volume(r, "capo-serve", "secrets")["secret"].update(defaultMode=0o644),
    ),
    Defect(
        "no_secret_lies_in_the_manifests",
        "committed",
        lambda r: r.objects.append({"kind": "Secret", "metadata": {"name": "capo-secrets"}}),
    ),
    Defect(
        "a_change_of_settings_is_a_rollout",
        "no hash",
        lambda r: container(r)["envFrom"][0]["configMapRef"].update(name="capo-settings"),
    ),
    Defect("settings_listen_on_the_ports_that_are_declared", "another port", lambda r: setting(r, "CAPO_PORT", "8080")),
    Defect(
        "every_setting_is_one_that_capo_has",
        "mistyped",
        lambda r: setting(r, "CAPO_DRAIN_SECOND", "240"),
    ),
    Defect(
        "settings_are_values_that_capo_takes",
        "a word for a number",
        lambda r: setting(r, "CAPO_PORT", "http"),
    ),
    Defect(
        "settings_are_values_that_capo_takes",
        "a launcher without what it needs",
        lambda r: container(r, "capo-control")["env"].remove(
            next(e for e in container(r, "capo-control")["env"] if e["name"] == "CAPO_KUBERNETES_IMAGE")
        ),
    ),
    Defect(
        "without_keys_only_the_demo_listens",
        "a real model open to all",
        lambda r: setting(r, "CAPO_ALLOW_UNAUTHENTICATED", "true"),
        "gpu",
    ),
    Defect(
        "secrets_lie_where_the_settings_look",
        "mounted elsewhere",
        lambda r: setting(r, "CAPO_SECRETS_DIR", "/etc/capo"),
    ),
    Defect(
        "a_shared_job_store_needs_its_secret",
        "optional",
        lambda r: volume(r, "capo-control", "secrets")["secret"].update(optional=True),
    ),
    Defect(
        "every_role_is_one_that_capo_has",
        "a word that is none",
        lambda r: environment(r, "capo-serve", "CAPO_ROLE", "inference"),
    ),
    # resources and volumes
    Defect(
        "memory_is_requested_as_limited",
        "overcommitted",
        lambda r: container(r)["resources"]["requests"].update(memory="1Gi"),
    ),
    Defect(
        "cpu_is_requested_and_not_limited", "throttled", lambda r: container(r)["resources"]["limits"].update(cpu="2")
    ),
    Defect(
        "every_empty_directory_has_a_limit",
        "a cache without end",
        lambda r: volume(r, "capo-serve", "cache")["emptyDir"].pop("sizeLimit"),
    ),
    Defect(
        "shared_memory_fits_into_the_pods_memory",
        "all of it",
        lambda r: volume(r, "capo-serve", "shm")["emptyDir"].update(sizeLimit="6Gi"),
    ),
    Defect(
        "who_computes_has_shared_memory", "on disk", lambda r: volume(r, "capo-serve", "shm")["emptyDir"].pop("medium")
    ),
    Defect(
        "what_capo_writes_to_is_writable",
        "no /tmp",
        lambda r: container(r)["volumeMounts"].remove(r.pod("capo-serve").mounts()["/tmp"]),
    ),
    Defect(
        "volumes_that_are_mounted_exist_and_are_used",
        "left over",
        lambda r: serve(r)["volumes"].append({"name": "old", "emptyDir": {"sizeLimit": "1Gi"}}),
    ),
    Defect(
        "claims_that_pods_name_exist",
        "renamed",
        lambda r: r.get("PersistentVolumeClaim", "capo-data")["metadata"].update(name="data"),
    ),
    Defect(
        "replicas_see_the_registry_only_and_read_only",
        "writable",
        lambda r: r.pod("capo-serve").mounts()["/data/registry"].pop("readOnly"),
    ),
    Defect(
        "replicas_see_the_registry_only_and_read_only",
        "uploads as well",
        lambda r: r.pod("capo-serve").mounts()["/data/registry"].pop("subPath"),
    ),
    Defect(
        "who_publishes_can_write_the_data",
        "read-only for control",
        lambda r: r.pod("capo-control").mounts()["/data"].update(readOnly=True),
    ),
    Defect(
        "a_volume_of_several_pods_can_be_shared",
        "one node only",
        lambda r: r.get("PersistentVolumeClaim", "capo-data")["spec"].update(accessModes=["ReadWriteOnce"]),
    ),
    Defect(
        "sqlite_is_never_shared",
        "PostgreSQL forgotten",
        lambda r: drop(r, "StatefulSet", "capo-postgresql"),
        "postgresql",
    ),
    # life
    Defect(
        "the_three_probes_have_three_handlers",
        "one for all",
        lambda r: container(r)["livenessProbe"]["httpGet"].update(path="/readyz"),
    ),
    Defect(
        "the_three_probes_have_three_handlers",
        "of the port that may ask for a certificate",
        lambda r: container(r)["livenessProbe"]["httpGet"].update(port="http"),
    ),
    Defect("the_three_probes_have_three_handlers", "no start", lambda r: container(r).pop("startupProbe")),
    Defect(
        "a_large_model_has_time_to_load", "a minute", lambda r: container(r)["startupProbe"].update(failureThreshold=6)
    ),
    Defect("liveness_is_patient", "three strikes", lambda r: container(r)["livenessProbe"].update(failureThreshold=3)),
    Defect(
        "readiness_is_quick",
        "half a minute",
        lambda r: container(r)["readinessProbe"].update(periodSeconds=10, failureThreshold=3),
    ),
    Defect(
        "the_grace_period_covers_pre_stop_drain_and_close",
        "a longer drain",
        lambda r: setting(r, "CAPO_DRAIN_SECONDS", "260"),
    ),
    Defect(
        "the_grace_period_covers_pre_stop_drain_and_close",
        "the default grace",
        lambda r: serve(r).update(terminationGracePeriodSeconds=30),
    ),
    Defect("endpoints_have_time_to_forget_a_pod", "no preStop", lambda r: container(r).pop("lifecycle")),
    Defect(
        "a_worker_has_time_to_put_its_job_back",
        "half a minute",
        lambda r: r.pod("capo-worker").spec.update(terminationGracePeriodSeconds=30),
        "postgresql",
    ),
    Defect(
        "training_yields_to_serving", "preempts", lambda r: r.get("PriorityClass", "capo-training").update(value=1000)
    ),
    Defect(
        "a_rollout_takes_no_capacity_away",
        "one may be missing",
        lambda r: r.get("Deployment", "capo-serve")["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
    ),
    Defect(
        "a_rollout_takes_no_capacity_away",
        "two pods on one GPU",
        lambda r: r.get("Deployment", "capo-serve")["spec"].update(strategy={"type": "RollingUpdate"}),
        "gpu",
    ),
    Defect(
        "a_stuck_rollout_is_noticed_after_the_longest_start",
        "before it could start",
        lambda r: r.get("Deployment", "capo-serve")["spec"].update(progressDeadlineSeconds=600),
    ),
    Defect(
        "workloads_select_their_own_pods_and_nobody_elses",
        "a shared label",
        lambda r: r.get("Deployment", "capo-serve")["spec"].update(
            selector={"matchLabels": {"app.kubernetes.io/name": "capo"}}
        ),
    ),
    Defect(
        "budgets_allow_one_pod_to_go",
        "none may go",
        lambda r: r.get("PodDisruptionBudget", "capo-serve")["spec"].update(maxUnavailable=0),
    ),
    Defect(
        "budgets_allow_one_pod_to_go",
        "of another label",
        lambda r: r.get("PodDisruptionBudget", "capo-serve")["spec"].update(selector={"matchLabels": {"app": "capo"}}),
    ),
    Defect(
        "who_asks_for_a_gpu_gets_a_node_that_has_one", "no toleration", lambda r: serve(r).pop("tolerations"), "gpu"
    ),
    Defect(
        "an_engine_that_shares_its_gpu_leaves_memory_for_training",
        "takes it all",
        lambda r: container(r).update(args=["serve"]),
        "gpu",
    ),
    # between pods
    Defect(
        "services_select_pods",
        "a mistyped label",
        lambda r: r.get("Service", "capo-serve")["spec"]["selector"].update({"app.kubernetes.io/component": "server"}),
    ),
    Defect(
        "services_lead_to_ports_that_pods_open",
        "another port",
        lambda r: r.get("Service", "capo-serve")["spec"]["ports"][0].update(targetPort="web"),
    ),
    Defect(
        "no_service_is_open_to_the_world",
        "LoadBalancer",
        lambda r: r.get("Service", "capo-serve")["spec"].update(type="LoadBalancer"),
    ),
    Defect(
        "everything_is_denied_that_is_not_allowed",
        "ingress only",
        lambda r: policy(r, "default-deny").update(policyTypes=["Ingress"]),
    ),
    Defect(
        "policies_select_pods_that_exist",
        "an old label",
        lambda r: policy(r, "allow-clients").update(podSelector={"matchLabels": {"app": "capo"}}),
    ),
    Defect("every_pod_can_ask_for_names", "no DNS", lambda r: drop(r, "NetworkPolicy", "allow-dns")),
    Defect(
        "clients_reach_the_api_and_not_the_metrics",
        "metrics too",
        lambda r: policy(r, "allow-clients")["ingress"][0]["ports"].append({"port": "metrics"}),
    ),
    Defect(
        "no_policy_lets_everybody_in",
        "an empty from",
        lambda r: policy(r, "allow-clients")["ingress"][0].update({"from": []}),
    ),
    Defect(
        "the_world_outside_is_reached_over_tls_only",
        "all ports",
        lambda r: policy(r, "allow-webhooks")["egress"][0].pop("ports"),
    ),
    Defect(
        "inner_addresses_are_out_of_reach_from_outside_traffic",
        "cloud metadata",
        lambda r: policy(r, "allow-webhooks")["egress"][0]["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16"),
    ),
    Defect(
        "who_sends_webhooks_reaches_the_world_outside",
        "no policy",
        lambda r: drop(r, "NetworkPolicy", "allow-webhooks"),
        "cpu-demo",
    ),
    Defect(
        "spans_reach_their_collector",
        "told of it, and not let through",
        lambda r: drop(r, "NetworkPolicy", "reach-collector"),
        components=("tracing",),
    ),
    Defect(
        "spans_reach_their_collector",
        "another port",
        lambda r: setting(r, "CAPO_OTLP_ENDPOINT", "http://otel-collector.observability.svc:4317"),
        components=("tracing",),
    ),
    Defect(
        "spans_reach_their_collector",
        "launched jobs are not",
        lambda r: policy(r, "reach-collector")["podSelector"]["matchExpressions"][0]["values"].remove("training"),
        components=("tracing",),
    ),
    Defect(
        "who_needs_the_job_store_reaches_it",
        "control does not",
        lambda r: policy(r, "reach-job-store")["podSelector"]["matchExpressions"][0]["values"].remove("control"),
    ),
    Defect(
        "launched_jobs_reach_the_job_store",
        "forgotten",
        lambda r: policy(r, "allow-job-store")["ingress"][0]["from"][0]["podSelector"]["matchExpressions"][0][
            "values"
        ].remove("training"),
    ),
    Defect(
        "nobody_reaches_replicas_from_training",
        "one namespace, one trust",
        lambda r: r.objects.append(
            {
                "kind": "NetworkPolicy",
                "metadata": {"name": "open"},
                "spec": {
                    "podSelector": {},
                    "policyTypes": ["Ingress", "Egress"],
                    "ingress": [{"from": [{"podSelector": {}}]}],
                    "egress": [{"to": [{"podSelector": {}}]}],
                },
            }
        ),
    ),
    # rights
    Defect(
        "rights_end_at_the_namespace",
        "a cluster role",
        lambda r: r.objects.append({"kind": "ClusterRole", "metadata": {"name": "capo"}}),
    ),
    Defect(
        "the_launcher_has_the_rights_it_uses_and_no_others",
        "secrets",
        lambda r: r.get("Role", "capo")["rules"].append(
            {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}
        ),
    ),
    Defect(
        "the_launcher_has_the_rights_it_uses_and_no_others",
        "cannot delete",
        lambda r: r.get("Role", "capo")["rules"][0]["verbs"].remove("delete"),
    ),
    Defect(
        "rights_are_bound_to_the_launcher_alone",
        "to all",
        lambda r: r.get("RoleBinding", "capo").update(subjects=[{"kind": "Group", "name": "system:serviceaccounts"}]),
    ),
    Defect(
        "launched_jobs_run_the_image_that_launches_them",
        "an older one",
        lambda r: environment(r, "capo-control", "CAPO_KUBERNETES_IMAGE", "registry.example.com/capo:old"),
    ),
    Defect(
        "the_quota_leaves_room_for_jobs_that_have_ended",
        "more Jobs and the same quota",
        lambda r: setting(r, "CAPO_MAX_LAUNCHED_JOBS", "20"),
    ),
    Defect(
        "training_happens_in_one_way", "nobody trains", lambda r: drop(r, "Deployment", "capo-worker"), "postgresql"
    ),
    # scaling and watching
    Defect(
        "one_autoscaler_at_most_and_only_of_replicas",
        "a fixed number",
        lambda r: r.get("Deployment", "capo-serve")["spec"].update(replicas=3),
    ),
    Defect(
        "one_autoscaler_at_most_and_only_of_replicas",
        "of the control process",
        lambda r: scaled(r)["scaleTargetRef"].update(name="capo-control"),
    ),
    Defect(
        "there_are_always_two_replicas_where_there_may_be_many",
        "down to none",
        lambda r: scaled(r).update(minReplicaCount=0),
    ),
    Defect(
        "replicas_go_slowly",
        "at once",
        lambda r: r.get("HorizontalPodAutoscaler", "capo-serve")["spec"]["behavior"].pop("scaleDown"),
        "replicas-hpa",
    ),
    Defect("replicas_come_by_waiting_requests_and_by_the_wait", "by the CPU", lambda r: scaled(r)["triggers"].pop()),
    Defect("replicas_come_by_waiting_requests_and_by_the_wait", "no fallback", lambda r: scaled(r).pop("fallback")),
    Defect(
        "prometheus_scrapes_everything_that_serves",
        "a port that is none",
        lambda r: r.get("ServiceMonitor", "capo")["spec"]["endpoints"][0].update(port="web"),
    ),
    Defect("prometheus_gets_through", "no policy", lambda r: drop(r, "NetworkPolicy", "allow-monitoring")),
    Defect(
        "prometheus_shows_a_key",
        "none",
        lambda r: r.get("ServiceMonitor", "capo")["spec"]["endpoints"][0].pop("authorization"),
    ),
    Defect(
        "a_scrape_is_bounded_and_ends_before_the_next",
        "no bound",
        lambda r: r.get("ServiceMonitor", "capo")["spec"].pop("sampleLimit"),
    ),
    Defect(
        "alerts_find_the_job_label_that_they_ask_for",
        "the service's name",
        lambda r: r.get("ServiceMonitor", "capo")["spec"].pop("jobLabel"),
    ),
    Defect("alerts_come_with_the_monitor", "dashboards are enough", lambda r: drop(r, "PrometheusRule", "capo")),
    Defect(
        "dashboards_are_found_by_the_sidecar",
        "no label",
        lambda r: r.get("ConfigMap", "capo-dashboard-slo")["metadata"]["labels"].pop("grafana_dashboard"),
    ),
    # Ray
    Defect(
        "a_ray_cluster_is_reached_by_the_control_process_at_one_port",
        "all ports",
        lambda r: (
            policy(r, "reach-ray")["egress"][0].pop("ports") and policy(r, "allow-ray")["ingress"][1].pop("ports")
        ),
        "ray",
    ),
    Defect(
        "a_ray_heads_service_is_the_one_that_is_asked",
        "another name",
        lambda r: environment(r, "capo-control", "CAPO_RAY_ADDRESS", "http://ray:8265"),
        "ray",
    ),
    Defect(
        "ray_nodes_run_the_image_that_has_ray",
        "the one without",
        lambda r: container(r, "ray trainers").update(image=container(r, "capo-control")["image"]),
        "ray",
    ),
    Defect(
        "ray_nodes_run_the_image_that_has_ray",
        "a newer version",
        lambda r: r.get("RayCluster", "capo-ray")["spec"].update(rayVersion="2.61.0"),
        "ray",
    ),
    Defect(
        "ray_nodes_are_asked_by_what_the_image_has",
        "left to the operator",
        lambda r: container(r, "ray head").pop("livenessProbe"),
        "ray",
    ),
    Defect(
        "ray_nodes_take_as_many_jobs_as_they_request_cores",
        "as many as the machine has",
        lambda r: r.get("RayCluster", "capo-ray")["spec"]["workerGroupSpecs"][0]["rayStartParams"].pop("num-cpus"),
        "ray",
    ),
]

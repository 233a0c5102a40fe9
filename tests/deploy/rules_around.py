"""Rules about what is around the pods: rights, launchers, autoscaling, monitoring, Ray."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from capo.settings import Settings
from tests.deploy.render import CONTAINER, Object, Render, selects
from tests.deploy.rules import rule, serving
from tests.deploy.rules_network import policies, ports_of, reaches

# -- rights ---------------------------------------------------------------------------------------------------------


@rule
def rights_end_at_the_namespace(render: Render) -> Iterator[str]:
    yield from (o["metadata"]["name"] for kind in ("ClusterRole", "ClusterRoleBinding") for o in render.of(kind))


@rule
def the_launcher_has_the_rights_it_uses_and_no_others(render: Render) -> Iterator[str]:
    """Those of tune/jobs/launchers/kubernetes_api.py: POST, GET of a list and DELETE of Jobs, GET of a list of pods."""
    wanted = {("batch", "jobs"): {"create", "list", "delete"}, ("", "pods"): {"list"}}
    launches = any(pod.environment("CAPO_LAUNCHER") == "kubernetes" for pod in render.pods())
    given: dict[tuple[str, str], set[str]] = {}
    for role in render.of("Role"):
        for entry in role["rules"]:
            for group in entry["apiGroups"]:
                for resource in entry["resources"]:
                    given.setdefault((group, resource), set()).update(entry["verbs"])
    if given != (wanted if launches else {}):
        yield f"{given}"


@rule
def rights_are_bound_to_the_launcher_alone(render: Render) -> Iterator[str]:
    for binding in render.of("RoleBinding"):
        subjects = [(s["kind"], s["name"]) for s in binding["subjects"]]
        known = {role["metadata"]["name"] for role in render.of("Role")}
        if subjects != [("ServiceAccount", "capo-control")] or binding["roleRef"]["name"] not in known:
            yield binding["metadata"]["name"]


@rule
def launched_jobs_run_the_image_that_launches_them(render: Render) -> Iterator[str]:
    for pod in render.pods():
        image = pod.environment("CAPO_KUBERNETES_IMAGE")
        if image is not None and image != pod.container["image"]:
            yield image


@rule
def launchers_are_told_what_they_need(render: Render) -> Iterator[str]:
    needed = {
        "kubernetes": ("CAPO_KUBERNETES_IMAGE", "CAPO_KUBERNETES_VOLUME_CLAIM", "CAPO_KUBERNETES_SECRET"),
        "ray": ("CAPO_RAY_ADDRESS",),
    }
    for pod in render.pods():
        for name in needed.get(pod.environment("CAPO_LAUNCHER") or "", ()):
            if not pod.environment(name):
                yield f"{pod.name}: {name}"


@rule
def training_happens_in_one_way(render: Render) -> Iterator[str]:
    launcher = next((found for pod in render.pods() if (found := pod.environment("CAPO_LAUNCHER"))), None)
    has_workers = render.has("Deployment", "capo-worker")
    is_split = render.has("Deployment", "capo-control")
    if is_split and has_workers is (launcher is not None):
        yield f"launcher {launcher}, workers {has_workers}"


@rule
def launched_jobs_have_a_bound(render: Render) -> Iterator[str]:
    if render.of("Role") and not render.of("ResourceQuota"):
        yield "no quota"


@rule
def the_quota_leaves_room_for_jobs_that_have_ended(render: Render) -> Iterator[str]:
    """It counts them too; the launcher keeps as many as it may run. Beyond: those in deletion, and the first key's."""
    for pod in render.pods():
        if pod.environment("CAPO_LAUNCHER") == "kubernetes":
            default = Settings.model_fields["max_launched_jobs"].default
            needed = 2 * int(render.settings(pod).get("CAPO_MAX_LAUNCHED_JOBS", default)) + 4
            for quota in render.of("ResourceQuota"):
                if int(quota["spec"]["hard"]["count/jobs.batch"]) < needed:
                    yield f"{quota['spec']['hard']} < {needed}"


# -- autoscaling ----------------------------------------------------------------------------------------------------


def autoscalers(render: Render) -> list[Object]:
    return [*render.of("HorizontalPodAutoscaler"), *render.of("ScaledObject")]


@rule
def one_autoscaler_at_most_and_only_of_replicas(render: Render) -> Iterator[str]:
    targets = [o["spec"]["scaleTargetRef"]["name"] for o in autoscalers(render)]
    if len(targets) > 1 or any(name != "capo-serve" for name in targets):
        yield f"{targets}"
    if targets and render.get("Deployment", "capo-serve")["spec"].get("replicas") is not None:
        yield "a fixed number would undo the autoscaler's"
    if targets and render.pod("capo-serve").environment("CAPO_ROLE") != "infer":
        yield "a pod with the job store cannot be several"


@rule
def there_are_always_two_replicas_where_there_may_be_many(render: Render) -> Iterator[str]:
    for item in autoscalers(render):
        least = item["spec"].get("minReplicas", item["spec"].get("minReplicaCount", 0))
        if least < 2:
            yield item["metadata"]["name"]


@rule
def replicas_go_slowly(render: Render) -> Iterator[str]:
    for item in autoscalers(render):
        spec = item["spec"]
        behavior = spec.get("behavior") or spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        if behavior.get("scaleDown", {}).get("stabilizationWindowSeconds", 0) < 300:
            yield item["metadata"]["name"]


@rule
def replicas_come_by_waiting_requests_and_by_the_wait(render: Render) -> Iterator[str]:
    for item in render.of("ScaledObject"):
        asked = " ".join(trigger["metadata"]["query"] for trigger in item["spec"]["triggers"])
        if "num_requests_waiting" not in asked or "capo:request_queue_seconds:p95_5m" not in asked:
            yield item["metadata"]["name"]
        if "fallback" not in item["spec"]:
            yield "nothing is said for a Prometheus that is away"
    for item in render.of("HorizontalPodAutoscaler"):
        names = {metric["external"]["metric"]["name"] for metric in item["spec"]["metrics"]}
        rules = yaml.safe_load(render.get("ConfigMap", "capo-adapter-rules")["data"]["config.yaml"])["externalRules"]
        if names != {entry["name"]["as"] for entry in rules}:
            yield f"{names}"


# -- monitoring -----------------------------------------------------------------------------------------------------


@rule
def prometheus_scrapes_everything_that_serves(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        for pod in serving(render):
            services = [
                service
                for service in render.of("Service")
                if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
                and selects(monitor["spec"]["selector"], service["metadata"]["labels"])
            ]
            ports = {port["name"] for service in services for port in service["spec"]["ports"]}
            if not {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports or not services:
                yield pod.name


@rule
def prometheus_gets_through(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        for pod in serving(render):
            allowed = {
                port["port"]
                for entry in policies(render, pod, "ingress")
                for peer in entry["from"]
                if peer.get("namespaceSelector") == {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
                for port in entry["ports"]
            }
            if allowed != wanted:
                yield f"{pod.name}: {allowed}"


@rule
def prometheus_shows_a_key(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint.get("authorization", {}).get("credentials", {}).get("name") != "capo-metrics-key":
                yield monitor["metadata"]["name"]


@rule
def a_scrape_is_bounded_and_ends_before_the_next(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            interval, timeout = (int(endpoint[name].removesuffix("s")) for name in ("interval", "scrapeTimeout"))
            if timeout >= interval or not 0 < monitor["spec"].get("sampleLimit", 0) <= 50000:
                yield monitor["metadata"]["name"]


@rule
def alerts_find_the_job_label_that_they_ask_for(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        label = monitor["spec"].get("jobLabel")
        if any(service["metadata"]["labels"].get(label) != "capo" for service in render.of("Service")):
            yield monitor["metadata"]["name"]


@rule
def alerts_come_with_the_monitor(render: Render) -> Iterator[str]:
    has_alerts = any("alert" in r for o in render.of("PrometheusRule") for g in o["spec"]["groups"] for r in g["rules"])
    if bool(render.of("ServiceMonitor")) is not has_alerts:
        yield "one without the other"


@rule
def dashboards_are_found_by_the_sidecar(render: Render) -> Iterator[str]:
    boards = [o for o in render.of("ConfigMap") if "dashboard" in o["metadata"]["name"]]
    if render.of("ServiceMonitor") and len(boards) != 6:
        yield f"{len(boards)} dashboards"
    for board in boards:
        if board["metadata"]["labels"].get("grafana_dashboard") != "1":
            yield board["metadata"]["name"]


# -- Ray --------------------------------------------------------------------------------------------------------------


@rule
def a_ray_cluster_is_reached_by_the_control_process_at_one_port(render: Render) -> Iterator[str]:
    if not render.of("RayCluster"):
        return
    head, control = render.pod("ray head"), render.pod("capo-control")
    if not reaches(render, control, head, "dashboard"):
        yield "the control process does not reach the jobs API"
    if any(reaches(render, control, head, port) for port in ("gcs", "client")):
        yield "the control process reaches more than the jobs API"
    if reaches(render, render.pod("capo-serve"), head, "dashboard"):
        yield "replicas reach it"
    for peer in (p for e in policies(render, head, "ingress") for p in e.get("from") or [{}]):
        if "podSelector" not in peer or "namespaceSelector" in peer:
            yield "others reach it"


@rule
def a_ray_heads_service_is_the_one_that_is_asked(render: Render) -> Iterator[str]:
    """KubeRay calls it <cluster>-head-svc; the jobs API is at the dashboard's port."""
    for cluster in render.of("RayCluster"):
        wanted = f"http://{cluster['metadata']['name']}-head-svc:{ports_of(render.pod('ray head'))['dashboard']}"
        if render.pod("capo-control").environment("CAPO_RAY_ADDRESS") != wanted:
            yield wanted


@rule
def ray_nodes_run_the_image_that_has_ray(render: Render) -> Iterator[str]:
    """The Dockerfile's target ray, and no other; tests/deploy/test_container.py tells what is in it."""
    for cluster in render.of("RayCluster"):
        if f"ray=={cluster['spec'].get('rayVersion')}" not in (CONTAINER / "requirements-ray.lock").read_text().split():
            yield f"another Ray than {cluster['spec'].get('rayVersion')}"
    for pod in render.pods():
        name = pod.container["image"].partition("@")[0].rpartition("/")[2]
        if (name == "capo-ray") is not (pod.kind == "RayCluster"):
            yield f"{pod.name}: {name}"


@rule
def ray_nodes_are_asked_by_what_the_image_has(render: Render) -> Iterator[str]:
    """KubeRay adds probes where there are none, which call wget."""
    for pod in render.pods():
        if pod.kind == "RayCluster":
            for name in ("livenessProbe", "readinessProbe"):
                command = pod.container.get(name, {}).get("exec", {}).get("command", [])
                if command[:2] != ["/opt/capo/bin/python", "/opt/healthcheck.py"]:
                    yield f"{pod.name}: {name}"


@rule
def ray_nodes_take_as_many_jobs_as_they_request_cores(render: Render) -> Iterator[str]:
    """A job asks for one core (tune/jobs/launchers/ray.py). Without a limit Ray counts the cores of the machine."""
    for cluster in render.of("RayCluster"):
        if cluster["spec"]["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield "the head works"
        for group in cluster["spec"]["workerGroupSpecs"]:
            requested = group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
            if group["rayStartParams"].get("num-cpus") != requested:
                yield group["groupName"]

"""Rules about what a pod lives on and how it lives: resources, volumes, probes, drains, rollouts, GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.render import Pod, Render, gibibytes, selects
from tests.deploy.rules import CLOSE_SECONDS, ENGINE_STOP_SECONDS, MARGIN_SECONDS, capo_rule, pod_rule, rule, serving
from tune.jobs.settings import STOP_GRACE_SECONDS

# -- resources and volumes ------------------------------------------------------------------------------------------


@pod_rule
def memory_is_requested_as_limited(pod: Pod) -> bool:
    resources = pod.container["resources"]
    return resources["requests"].get("memory") == resources["limits"].get("memory") is not None


@pod_rule
def cpu_is_requested_and_not_limited(pod: Pod) -> bool:
    """A limit would throttle the event loop in the middle of a stream."""
    resources = pod.container["resources"]
    return "cpu" in resources["requests"] and "cpu" not in resources["limits"]


@pod_rule
def disk_of_the_node_is_bounded(pod: Pod) -> bool:
    return "ephemeral-storage" in pod.container["resources"]["limits"]


@pod_rule
def every_empty_directory_has_a_limit(pod: Pod) -> bool:
    return all(v["emptyDir"].get("sizeLimit") for v in pod.spec["volumes"] if "emptyDir" in v)


@pod_rule
def shared_memory_fits_into_the_pods_memory(pod: Pod) -> bool:
    shm = [v for v in pod.spec["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
    limit = gibibytes(pod.container["resources"]["limits"]["memory"])
    return sum(gibibytes(v["emptyDir"]["sizeLimit"]) for v in shm) <= limit / 2


@capo_rule
def who_computes_has_shared_memory(pod: Pod) -> bool:
    if pod.environment("CAPO_ROLE") == "control":
        return "/dev/shm" not in pod.mounts()
    mount = pod.mounts().get("/dev/shm")
    return mount is not None and pod.volume(mount["name"])["emptyDir"].get("medium") == "Memory"


@capo_rule
def what_capo_writes_to_is_writable(pod: Pod) -> bool:
    return {"/data", "/cache", "/tmp"} <= {path for path, mount in pod.mounts().items() if not mount.get("readOnly")}


@rule
def volumes_that_are_mounted_exist_and_are_used(render: Render) -> Iterator[str]:
    for pod in render.pods():
        claims = {t["metadata"]["name"] for t in pod.workload["spec"].get("volumeClaimTemplates", [])}
        known = {v["name"] for v in pod.spec["volumes"]} | claims
        if {m["name"] for m in pod.container["volumeMounts"]} != known:
            yield pod.name


@rule
def claims_that_pods_name_exist(render: Render) -> Iterator[str]:
    known = {o["metadata"]["name"] for o in render.of("PersistentVolumeClaim")}
    for pod in render.pods():
        claims = {v["persistentVolumeClaim"]["claimName"] for v in pod.spec["volumes"] if "persistentVolumeClaim" in v}
        if not claims <= known:
            yield pod.name


@rule
def replicas_see_the_registry_only_and_read_only(render: Render) -> Iterator[str]:
    for pod in render.capo_pods():
        if pod.environment("CAPO_ROLE") == "infer":
            mount = pod.mounts().get("/data/registry", {})
            is_read_only = mount.get("readOnly") is True and mount.get("subPath") == "registry"
            claims = [m for m in pod.mounts().values() if "persistentVolumeClaim" in pod.volume(m["name"])]
            claim = pod.volume(mount.get("name", "secrets")).get("persistentVolumeClaim", {})
            if not is_read_only or claims != [mount] or claim.get("readOnly") is not True:
                yield pod.name


@rule
def who_publishes_can_write_the_data(render: Render) -> Iterator[str]:
    for pod in render.capo_pods():
        if pod.environment("CAPO_ROLE") != "infer":
            mount = pod.mounts().get("/data", {})
            volume = pod.volume(mount.get("name", "secrets"))
            if mount.get("readOnly") or volume.get("persistentVolumeClaim", {}).get("claimName") != "capo-data":
                yield pod.name


@rule
def a_volume_of_several_pods_can_be_shared(render: Render) -> Iterator[str]:
    users = [p for p in render.pods() for v in p.spec["volumes"] if "persistentVolumeClaim" in v]
    modes = render.get("PersistentVolumeClaim", "capo-data")["spec"]["accessModes"]
    if modes != (["ReadWriteMany"] if len(users) > 1 else ["ReadWriteOnce"]):
        yield f"{len(users)} users, {modes}"


@rule
def sqlite_is_never_shared(render: Render) -> Iterator[str]:
    """Its write-ahead log needs all processes on one host."""
    if len(render.capo_pods()) > 1 and not render.has("StatefulSet", "capo-postgresql"):
        yield "several pods without PostgreSQL"


# -- life: probes, drain, rollout -----------------------------------------------------------------------------------


@rule
def the_three_probes_have_three_handlers(render: Render) -> Iterator[str]:
    wanted = {"startupProbe": "/startupz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for pod in serving(render):
        probes = {name: pod.container.get(name, {}).get("httpGet", {}) for name in wanted}
        if {name: get.get("path") for name, get in probes.items()} != wanted:
            yield pod.name
        # The API's own port may speak TLS and ask for certificates, of which a kubelet has none.
        if any(get.get("port") != "health" for get in probes.values()):
            yield f"{pod.name}: port"


@rule
def a_large_model_has_time_to_load(render: Render) -> Iterator[str]:
    probe = render.pod("capo-serve").container.get("startupProbe", {})
    if probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) < 900:
        yield "capo-serve"


@rule
def liveness_is_patient(render: Render) -> Iterator[str]:
    for pod in serving(render):
        probe = pod.container.get("livenessProbe", {})
        if probe.get("periodSeconds", 0) * probe.get("failureThreshold", 0) < 60 or probe.get("timeoutSeconds", 1) < 5:
            yield pod.name


@rule
def readiness_is_quick(render: Render) -> Iterator[str]:
    for pod in serving(render):
        probe = pod.container.get("readinessProbe", {})
        if probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) > 5:
            yield pod.name


@rule
def the_grace_period_covers_pre_stop_drain_and_close(render: Render) -> Iterator[str]:
    for pod in serving(render):
        pre_stop = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = float(render.settings(pod).get("CAPO_DRAIN_SECONDS", 20))
        needed = pre_stop + drain + CLOSE_SECONDS + ENGINE_STOP_SECONDS + MARGIN_SECONDS
        if pod.spec["terminationGracePeriodSeconds"] < needed:
            yield f"{pod.name}: {pod.spec['terminationGracePeriodSeconds']} < {needed}"


@rule
def endpoints_have_time_to_forget_a_pod(render: Render) -> Iterator[str]:
    for pod in serving(render):
        pre_stop = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        readiness = pod.container["readinessProbe"]
        if pre_stop < 2 * readiness["periodSeconds"] * readiness["failureThreshold"]:
            yield pod.name


@rule
def a_worker_has_time_to_put_its_job_back(render: Render) -> Iterator[str]:
    for pod in render.capo_pods():
        grace = float(render.settings(pod).get("CAPO_WORKER_STOP_SECONDS", STOP_GRACE_SECONDS))
        if pod.component == "worker" and pod.spec.get("terminationGracePeriodSeconds", 30) < grace + MARGIN_SECONDS:
            yield pod.name


@rule
def training_yields_to_serving(render: Render) -> Iterator[str]:
    for priority in render.of("PriorityClass"):
        if priority["value"] >= 0 or priority.get("preemptionPolicy") != "Never":
            yield "the priority class"
    for pod in render.pods():
        if pod.kind == "Deployment" and pod.component == "worker" and pod.spec.get("priorityClassName") is None:
            yield pod.name


@rule
def a_rollout_takes_no_capacity_away(render: Render) -> Iterator[str]:
    """But where the pod holds the only GPU, or SQLite, the old one must go first."""
    for pod in serving(render):
        strategy = pod.workload["spec"]["strategy"]
        alone = pod.environment("CAPO_ROLE") is None
        rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        if strategy != ({"type": "Recreate"} if alone else rolling):
            yield f"{pod.name}: {strategy}"


@rule
def ready_for_a_moment_is_not_rolled_out(render: Render) -> Iterator[str]:
    yield from (pod.name for pod in serving(render) if pod.workload["spec"].get("minReadySeconds", 0) < 5)


@rule
def a_stuck_rollout_is_noticed_after_the_longest_start(render: Render) -> Iterator[str]:
    for pod in serving(render):
        probe = pod.container.get("startupProbe", {})
        longest = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        if pod.workload["spec"].get("progressDeadlineSeconds", 600) <= longest:
            yield pod.name


@rule
def replicas_spread_over_nodes(render: Render) -> Iterator[str]:
    pod = render.pod("capo-serve")
    constraints = pod.spec.get("topologySpreadConstraints", [])
    if not any(
        c["topologyKey"] == "kubernetes.io/hostname" and selects(c["labelSelector"], pod.labels) for c in constraints
    ):
        yield "capo-serve"


@rule
def workloads_select_their_own_pods_and_nobody_elses(render: Render) -> Iterator[str]:
    pods = [pod for pod in render.pods() if pod.kind != "RayCluster"]
    for pod in pods:
        chosen = [other.name for other in pods if selects(pod.workload["spec"]["selector"], other.labels)]
        if chosen != [pod.name]:
            yield f"{pod.name} selects {chosen}"


@rule
def budgets_allow_one_pod_to_go(render: Render) -> Iterator[str]:
    budgets = render.of("PodDisruptionBudget")
    for pod in serving(render):
        of_pod = [b for b in budgets if selects(b["spec"]["selector"], pod.labels)]
        if len(of_pod) != 1 or of_pod[0]["spec"].get("maxUnavailable") != 1:
            yield pod.name
        elif of_pod[0]["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{pod.name}: unhealthy pods block a node"


# -- the gpu overlay ------------------------------------------------------------------------------------------------


@rule
def who_asks_for_a_gpu_gets_a_node_that_has_one(render: Render) -> Iterator[str]:
    for pod in render.pods():
        gpus = pod.container["resources"]["limits"].get("nvidia.com/gpu")
        if gpus is None:
            continue
        if pod.container["resources"]["requests"].get("nvidia.com/gpu") != gpus:
            yield f"{pod.name}: request and limit differ"
        if not any(t.get("key") == "nvidia.com/gpu" for t in pod.spec.get("tolerations", [])):
            yield f"{pod.name}: no toleration"
        if "nvidia.com/gpu.present" not in pod.spec.get("nodeSelector", {}):
            yield f"{pod.name}: any node"


@rule
def an_engine_that_shares_its_gpu_leaves_memory_for_training(render: Render) -> Iterator[str]:
    pod = render.pod("capo-serve")
    if "nvidia.com/gpu" in pod.container["resources"]["limits"] and pod.environment("CAPO_ROLE") is None:
        args: list[str] = pod.container["args"]
        share = float(args[args.index("--gpu-memory-utilization") + 1]) if "--gpu-memory-utilization" in args else 1.0
        if share > 0.7:
            yield "capo-serve"

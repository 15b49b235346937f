"""What the manifests of infra/kubernetes promise: rights, network, retries, places, versions, metrics."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pipelines import errors
from pipelines.cluster import metrics
from pipelines.config.loading import load_config
from tests.support.manifests import (
    KUBERNETES,
    OVERLAYS,
    POOL,
    ROOTS,
    PodTemplate,
    faults_of_call,
    flow_run,
    named,
    pod_templates,
    rendered,
)

ROOT = KUBERNETES.parents[1]
LOCK = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))
RELEASE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
POLICY = "NetworkPolicy"
VERBS = {"ingest", "train", "encode", "encode-query", "index", "evaluate", "verify"}


def pods(root: str) -> list[PodTemplate]:
    """All Pods of a root, with those that Prefect's worker makes from the template of the work pool."""
    found = [pod for manifest in rendered(root) for pod in pod_templates(manifest)]
    return [*found, *pod_templates(flow_run())] if root.startswith("overlays/") else found


# -------------------------------------------------------------------------------------------------- rights


@pytest.mark.parametrize("root", ROOTS)
def test_every_pod_is_within_the_restricted_profile(root: str) -> None:
    for pod in pods(root):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] >= 999, pod.owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.owner
        kinds = {kind for volume in pod.spec.get("volumes", ()) for kind in set(volume) - {"name"}}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}, pod.owner
        for container in pod.containers:
            assert confined(container["securityContext"]), (pod.owner, container["name"])
            assert not any("hostPort" in port for port in container.get("ports", ())), pod.owner


def confined(security: dict[str, Any]) -> bool:
    allowed = {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}
    dropped = security["capabilities"] == {"drop": ["ALL"]}
    return security["allowPrivilegeEscalation"] is False and dropped and set(security) <= allowed


def test_the_autoscaler_beside_the_head_is_confined_too_and_the_namespace_insists() -> None:
    cluster = named("overlays/s3", "RayCluster", "hhnet")
    assert confined(cluster["spec"]["autoscalerOptions"]["securityContext"])
    labels = named("overlays/s3", "Namespace", "hhnet")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("root", ROOTS)
def test_only_what_calls_the_kubernetes_api_has_a_token_for_it(root: str) -> None:
    callers = {"RayCluster hhnet", "Deployment prefect-worker"}
    for pod in pods(root):
        head = any(container["name"] == "ray-head" for container in pod.spec["containers"])
        worker = pod.owner == "Deployment prefect-worker"
        assert pod.spec.get("automountServiceAccountToken", worker) is (head or worker), pod.owner
        assert pod.spec["enableServiceLinks"] is False, "a variable such as PREFECT_PORT would change the entry point"
    assert callers <= {pod.owner for pod in pods("overlays/s3")}


@pytest.mark.parametrize("root", ROOTS)
def test_every_container_asks_for_what_it_may_use(root: str) -> None:
    for pod in pods(root):
        for container in pod.containers:
            asked, most = (container["resources"][name] for name in ("requests", "limits"))
            assert {"cpu", "memory"} <= set(asked) and set(asked) == set(most), (pod.owner, container["name"])


def test_work_on_gpus_goes_to_nodes_that_have_them() -> None:
    cluster = named("overlays/gpu", "RayCluster", "hhnet")
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}
    assert groups["gpu"]["nodeSelector"]["nvidia.com/gpu.present"] == "true"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in groups["gpu"]["tolerations"]
    assert "nvidia.com/gpu" not in str(groups["cpu"])
    settings = load_config(KUBERNETES / "overlays/gpu/hhnet.toml", (), {})
    assert settings.encode.gpus == settings.train.gpus == 1


# ------------------------------------------------------------------------------------------------- network


def selectors(node: Any) -> Iterator[dict[str, str]]:
    """The labels by which a network policy selects Pods of its own namespace."""
    if isinstance(node, dict):
        if "podSelector" in node and "namespaceSelector" not in node:
            yield node["podSelector"].get("matchLabels", {})
        for value in node.values():
            yield from selectors(value)
    elif isinstance(node, list):
        for value in node:
            yield from selectors(value)


def test_nothing_is_open_but_what_a_policy_names() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in rendered("overlays/s3") if each["kind"] == POLICY}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ours = [pod.labels for pod in (*pods("overlays/s3"), *pods("jobs"))]
    for name, policy in policies.items():
        for labels in selectors(policy):
            assert any(labels.items() <= pod.items() for pod in ours), f"{name} selects nothing by {labels}"


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("RayJob hhnet-encode", "RayCluster hhnet", 8265),
        ("CronJob hhnet-nightly", "RayCluster hhnet", 8265),
        ("Job flow-run", "RayCluster hhnet", 8265),
        ("CronJob hhnet-nightly", "Deployment prefect-server", 4200),
        ("Job flow-run", "Deployment prefect-server", 4200),
        ("Deployment prefect-worker", "Deployment prefect-server", 4200),
        ("RayCluster hhnet", "StatefulSet hhnet-redis", 6379),
        ("RayCluster hhnet", "RayCluster hhnet", 10002),
    ],
)
def test_who_must_reach_whom_does(source: str, target: str, port: int) -> None:
    assert passes(source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("CronJob hhnet-nightly", "StatefulSet hhnet-redis", 6379),
        ("CronJob hhnet-nightly", "RayCluster hhnet", 6379),
        ("StatefulSet hhnet-redis", "RayCluster hhnet", 8265),
        ("Deployment prefect-worker", "RayCluster hhnet", 8265),
        ("RayCluster hhnet", "Deployment prefect-server", 4200),
    ],
)
def test_who_need_not_reach_whom_does_not(source: str, target: str, port: int) -> None:
    assert not passes(source, target, port)


def passes(source: str, target: str, port: int) -> bool:
    """If both ends let a connection pass."""
    labels = {pod.owner: pod.labels for pod in (*pods("overlays/s3"), *pods("jobs"))}
    ends = (("egress", "to", labels[source], labels[target]), ("ingress", "from", labels[target], labels[source]))
    return all(lets(*end, port) for end in ends)


def lets(way: str, peers: str, own: dict[str, str], other: dict[str, str], port: int) -> bool:
    for policy in rendered("overlays/s3"):
        if policy["kind"] != POLICY or not matches(policy["spec"]["podSelector"], own):
            continue
        for rule in policy["spec"].get(way, ()):
            ports = {each["port"] for each in rule.get("ports", ())}
            known = [each["podSelector"] for each in rule[peers] if set(each) == {"podSelector"}]
            if (not ports or port in ports) and any(matches(each, other) for each in known):
                return True
    return False


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


# ------------------------------------------------------------------------------------------ verbs and retries


def test_every_verb_has_a_job_that_starts_it() -> None:
    jobs = {each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"] for each in rendered("jobs")}
    assert set(jobs) == VERBS
    for name, spec in jobs.items():
        script, retry, *command = shlex.split(spec["entrypoint"])
        assert (script, retry, command[:3]) == ("/opt/hhnet/entrypoint.sh", "retry", ["python", "-m", "pipelines"])
        assert command[3] == name.partition("-")[0]
        assert faults_of_call(command[3:]) == set()


def test_exits_that_would_come_again_are_not_tried_again() -> None:
    """The CronJob sees exit codes; KubeRay does not, so it never starts a job again and the entry point does."""
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert codes == {1, 2, 3, 4}
    job = named("overlays/s3", "CronJob", "hhnet-nightly")["spec"]["jobTemplate"]["spec"]
    final, disruption = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert final["action"] == "FailJob" and final["onExitCodes"]["operator"] == "In"
    assert set(final["onExitCodes"]["values"]) == codes - {errors.Unavailable.exit_code}
    assert final["onExitCodes"]["containerName"] == container["name"]
    assert disruption["action"] == "Ignore" and job["backoffLimit"] > 0
    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy needs it"
    cron = named("raycronjob", "RayCronJob", "hhnet-verify")["spec"]["jobTemplate"]
    for spec in (*(each["spec"] for each in rendered("jobs")), cron):
        assert spec["backoffLimit"] == 0 and spec["clusterSelector"] == {"ray.io/cluster": "hhnet"}
        assert spec["submissionMode"] == ("HTTPMode" if spec is cron else "K8sJobMode")  # any text is valid
        assert shlex.split(spec["entrypoint"])[1] == "retry"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_nightly_run_and_the_settings_of_each_overlay_hold(overlay: str, tmp_path: Path) -> None:
    toml = tmp_path / "hhnet.toml"
    toml.write_text(named(overlay, "ConfigMap", "hhnet-settings")["data"]["hhnet.toml"])
    settings = load_config(toml, (), {})
    store = named(overlay, "ConfigMap", "hhnet-store")["data"]["HHNET_STORE"]
    places = (settings.run.out, settings.run.train, settings.run.query, *settings.run.database)
    assert all(place and place.startswith(store) for place in places)
    assert settings.store.shared is not store.startswith("s3://")
    assert settings.ray.wait_s >= 900, "a node takes minutes to start"
    job = named(overlay, "CronJob", "hhnet-nightly")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    role, program, *words = job["containers"][0]["args"]
    assert (role, program) == ("client", "hhnet") and faults_of_call(words) == set()
    assert named(overlay, "CronJob", "hhnet-nightly")["spec"]["concurrencyPolicy"] == "Forbid"


# ------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_pods_mount_and_name_is_there(overlay: str) -> None:
    made = {(each["kind"], each["metadata"]["name"]) for each in (*rendered(overlay), *rendered("jobs"))}
    by_hand = {f"hhnet-{name}" for name in ("s3", "redis", "prefect")}  # and `hhnet`, by the operator
    readme = (ROOT / "infra" / "README.md").read_text()
    assert all(f"create secret generic {name} " in readme for name in by_hand)
    for pod in (*pods(overlay), *pods("jobs")):
        text = json.dumps(pod.template)
        assert set(re.findall(r'"configMap(?:Ref)?": \{"name": "([^"]+)"', text)) <= {
            name for kind, name in made if kind == "ConfigMap"
        }
        assert set(re.findall(r'"claimName": "([^"]+)"', text)) <= {
            name for kind, name in made if kind == "PersistentVolumeClaim"
        }
        secrets = re.findall(r'"secretName": "([^"]+)"', text)
        secrets += re.findall(r'"secretKeyRef": \{[^}]*"name": "([^"]+)"', text)
        assert set(secrets) <= by_hand | {"hhnet"}, pod.owner
        account = pod.spec.get("serviceAccountName", "default")
        assert account == "default" or ("ServiceAccount", account) in made
        for container in pod.containers:
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            claims = {"data"} if pod.owner.startswith("StatefulSet") else set()
            assert mounted <= {volume["name"] for volume in pod.spec.get("volumes", ())} | claims, pod.owner


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name in ("overlays/pvc", "overlays/kind")])
def test_whoever_touches_data_on_a_volume_mounts_it(overlay: str) -> None:
    for pod in pods(overlay):
        if pod.owner in ("RayCluster hhnet", "CronJob hhnet-nightly", "Job hhnet-fill"):
            assert {"name": "data", "mountPath": "/data"} in pod.spec["containers"][0]["volumeMounts"], pod.owner


def test_no_secret_stands_in_a_manifest_and_identity_takes_the_place_of_keys() -> None:
    for root in ROOTS:
        assert not any(each["kind"] == "Secret" for each in rendered(root))
        text = json.dumps(rendered(root))
        assert not re.search(r'(?i)"(aws_secret_access_key|aws_access_key_id|password|token)": "', text)
    account = named("overlays/eks", "ServiceAccount", "hhnet")
    assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")
    for pod in pods("overlays/eks"):
        for volume in pod.spec.get("volumes", ()):
            if volume.get("secret", {}).get("secretName") == "hhnet-s3":
                assert volume["secret"]["optional"] is True and pod.spec["serviceAccountName"] == "hhnet"


def test_the_head_keeps_its_state_in_redis() -> None:
    options = named("overlays/s3", "RayCluster", "hhnet")["spec"]["gcsFaultToleranceOptions"]
    service = named("overlays/s3", "Service", "hhnet-redis")
    assert options["redisAddress"] == f"hhnet-redis:{service['spec']['ports'][0]['port']}"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "hhnet-redis", "key": "redis_password"}
    (claim,) = named("overlays/s3", "StatefulSet", "hhnet-redis")["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "data"


@pytest.mark.parametrize("root", ROOTS)
def test_versions_of_images_and_ray_are_those_of_the_project(root: str) -> None:
    images = {container["image"] for pod in pods(root) for container in pod.containers}
    expected = {f"hhnet:{RELEASE}-cpu"}
    if root != "jobs":
        expected |= {"redis:7.4.6", f"prefecthq/prefect:{LOCK['prefect']}-python3.11-kubernetes"}
    assert images == expected | ({f"hhnet:{RELEASE}-gpu"} if root == "overlays/gpu" else set())
    if root.startswith("overlays/"):
        assert named(root, "RayCluster", "hhnet")["spec"]["rayVersion"] == LOCK["ray"]


# ------------------------------------------------------------------------------------- work pool and metrics


def test_the_template_of_the_work_pool_is_one_of_prefects_kubernetes_worker() -> None:
    views = files("prefect") / "server" / "api" / "collections_data" / "views"
    shipped = json.loads((views / "aggregate-worker-metadata.json").read_text())
    worker = shipped["prefect-kubernetes"]["kubernetes"]
    theirs = worker["default_base_job_configuration"]
    assert set(POOL["job_configuration"]) <= set(theirs["job_configuration"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(POOL["job_configuration"])))
    assert used == set(POOL["variables"]["properties"]), "Prefect drops a variable that is not used"
    extra = {"node_selector", "tolerations", "volumes", "volume_mounts"}
    assert used - extra <= set(theirs["variables"]["properties"])
    environment = POOL["variables"]["properties"]["env"]["default"]
    nightly = named("overlays/s3", "CronJob", "hhnet-nightly")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    same = {each["name"]: each["value"] for each in nightly["containers"][0]["env"]}
    assert environment["RAY_ADDRESS"] == same["RAY_ADDRESS"]
    assert environment["RAY_AUTH_TOKEN_PATH"] == same["RAY_AUTH_TOKEN_PATH"]


def test_the_dashboard_asks_for_metrics_that_hhnet_exports_by_labels_that_they_have() -> None:
    exported = {f"ray_{name}_total": {"verb", tag} - {""} for name, (_, tag) in metrics._COUNTERS.items()}
    queue, _, state = metrics._QUEUE
    exported[f"ray_{queue}"] = {"verb", state}
    by_ray = {"NodeAddress"}
    board = json.loads(named("overlays/s3", "ConfigMap", "hhnet-dashboard")["data"]["hhnet.json"])
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    seen = set()
    for expression in asked:
        names = set(re.findall(r"\bray_\w+", expression))
        assert names and names <= set(exported), expression
        labels = set(re.findall(r"(\w+)=~", expression))
        labels |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert all(labels <= exported[name] | by_ray for name in names), expression
        seen |= names
    assert seen == set(exported), "each metric has a panel"
    monitor = named("overlays/s3", "PodMonitor", "hhnet-ray")["spec"]
    for pod in pods("overlays/s3"):
        if pod.owner == "RayCluster hhnet":
            assert matches(monitor["selector"], pod.labels)
            ports = {port["name"] for port in pod.spec["containers"][0]["ports"]}
            assert {each["port"] for each in monitor["podMetricsEndpoints"]} <= ports

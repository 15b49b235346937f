"""Every manifest of infra/kubernetes against the schemas of those who read it: Kubernetes, Ray, KubeRay, Prometheus.

The schemas of Kubernetes and Ray's own reader are in installed packages. Those of the custom resources are named by
their address and digest; without the internet their test is skipped and says so.
"""

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pooch
import pytest
import requests
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start
from referencing import Registry, Resource

from tests.support.manifests import OVERLAYS, ROOTS, flow_run, named, pod_templates, rendered

VERSION = "v1.37.0"
KUBERAY = "https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/"
PROMETHEUS = "https://raw.githubusercontent.com/prometheus-operator/prometheus-operator/v0.93.0/example/"
CUSTOM = {
    "RayCluster": (
        f"{KUBERAY}ray.io_rayclusters.yaml",
        "c44704442eef0c6721ad40c1d66782c8bd3fdab9d3344306a5820910a679baa1",
    ),
    "RayJob": (f"{KUBERAY}ray.io_rayjobs.yaml", "01a5cf3b17c1769fda44af7e82debcd98722f0c27b9ab84d084681c6649121f5"),
    "RayCronJob": (
        f"{KUBERAY}ray.io_raycronjobs.yaml",
        "31c2c753bba01f7e8e89cb8e8c504131b58ee42090ca536d87f5ac27605a568e",
    ),
    "PodMonitor": (
        f"{PROMETHEUS}prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
        "45a93443daa687d3654f7e9631909ff7edcdf3ec09c5e60251b74aa2722aee5d",
    ),
}
"""Address and sha256 of the definition of each custom resource."""
DOWNLOAD_S = 5


@cache
def validator(file: str) -> jsonschema.Draft202012Validator:
    """Kubernetes' strict schema of a kind: unknown fields are errors."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"{VERSION}-local-strict"
    schema, definitions = (json.loads((folder / name).read_text()) for name in (file, "_definitions.json"))
    registry: Any = Resource.from_contents(schema) @ (Resource.from_contents(definitions) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def faults(found: jsonschema.Draft202012Validator, node: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in found.iter_errors(node)]


def schema_file(manifest: dict[str, Any]) -> str:
    group, _, version = manifest["apiVersion"].rpartition("/")
    return f"{manifest['kind'].lower()}-{group.partition('.')[0]}{'-' * bool(group)}{version}.json"


@pytest.mark.parametrize("root", ROOTS)
def test_kubernetes_knows_every_field(root: str) -> None:
    checked = 0
    for manifest in rendered(root):
        if manifest["kind"] not in CUSTOM:
            assert faults(validator(schema_file(manifest)), manifest) == [], manifest["metadata"]["name"]
            checked += 1
        for pod in (*pod_templates(manifest), *pod_templates(flow_run())):
            assert faults(validator("podtemplatespec-v1.json"), pod.template) == [], pod.owner
            checked += 1
    assert checked >= (20 if root != "jobs" else 7)


def test_an_unknown_field_and_a_wrong_type_are_found() -> None:
    cron = json.loads(json.dumps(named("overlays/s3", "CronJob", "hhnet-nightly")))
    cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["2"]
    cron["spec"]["backofLimit"] = 1
    assert len(faults(validator(schema_file(cron)), cron)) == 2


# ------------------------------------------------------------------------------------------- custom resources

JOB = {
    *("entrypoint", "submissionMode", "clusterSelector.ray.io/cluster", "backoffLimit", "activeDeadlineSeconds"),
    *("submitterConfig.backoffLimit", "submitterPodTemplate"),
}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "template"}
FIELDS = {
    "RayCluster": {
        *("rayVersion", "authOptions.mode", "enableInTreeAutoscaling", "headGroupSpec.template"),
        *("headGroupSpec.rayStartParams.num-cpus", "headGroupSpec.rayStartParams.dashboard-host"),
        *(f"autoscalerOptions.{name}" for name in ("version", "idleTimeoutSeconds")),
        *(f"autoscalerOptions.securityContext.{name}" for name in ("allowPrivilegeEscalation", "capabilities.drop")),
        *(f"autoscalerOptions.resources.{part}.{of}" for part in ("requests", "limits") for of in ("cpu", "memory")),
        "gcsFaultToleranceOptions.redisAddress",
        *(f"gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.{name}" for name in ("name", "key")),
        *(f"workerGroupSpecs.{name}" for name in GROUP),
    },
    "RayJob": JOB,
    "RayCronJob": {"schedule", "timeZone", *(f"jobTemplate.{name}" for name in JOB)},
    "PodMonitor": {
        "selector.matchLabels.ray.io/is-ray-node",
        *(f"podMetricsEndpoints.{name}" for name in ("port", "interval")),
        *(f"podMetricsEndpoints.relabelings.{name}" for name in ("sourceLabels", "targetLabel")),
    },
}
"""What the manifests use of each custom resource, apart from Pods: another name is a mistake, or to be entered here."""


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted paths in a manifest, down to texts, numbers and templates of Pods."""
    if isinstance(node, dict) and node and "containers" not in node.get("spec", ()):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, path)
    elif node != {}:
        yield ".".join(path)


@pytest.mark.parametrize("root", ROOTS)
def test_custom_resources_use_known_fields_only(root: str) -> None:
    for manifest in rendered(root):
        if manifest["kind"] in CUSTOM:
            unknown = set(leaves(manifest["spec"])) - FIELDS[manifest["kind"]]
            assert unknown == set(), manifest["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_autoscaler_reads_the_groups_of_the_cluster(overlay: str) -> None:
    cluster = named(overlay, "RayCluster", "hhnet")
    read = _derive_autoscaling_config_from_ray_cr(cluster)
    groups = {name: kind for name, kind in read["available_node_types"].items() if name != read["head_node_type"]}
    assert read["available_node_types"][read["head_node_type"]]["resources"]["CPU"] == 0, "the head does no work"
    assert set(groups) == ({"cpu", "gpu"} if overlay == "overlays/gpu" else {"cpu"})
    for name, group in groups.items():
        assert group["min_workers"] == 0 < group["max_workers"], "workers come when they are asked for"
        assert group["resources"]["CPU"] >= 1 and group["resources"]["memory"] > 2**30
        assert group["resources"].get("GPU", 0) == (1 if name == "gpu" else 0)
    assert cluster["spec"]["enableInTreeAutoscaling"] is True and read["idle_timeout_minutes"] == 5


def test_rays_start_knows_every_parameter_that_kuberay_hands_on() -> None:
    known = {flag for parameter in start.params for flag in parameter.opts}
    spec = named("overlays/gpu", "RayCluster", "hhnet")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def strict(schema: Any) -> Any:
    """The schema of a custom resource, by which unknown fields are errors: the API server would drop them silently."""
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key not in ("properties", "items")}
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@pytest.fixture(scope="module")
def definitions() -> dict[str, jsonschema.Draft202012Validator]:
    """A validator for each custom resource, from the definitions that their projects publish."""
    made = {}
    for kind, (url, digest) in CUSTOM.items():
        try:
            path = pooch.retrieve(
                url,
                f"sha256:{digest}",
                fname=f"{digest}.yaml",
                path=pooch.os_cache("hhnet-schemas"),
                downloader=pooch.HTTPDownloader(timeout=DOWNLOAD_S),
            )
        except (OSError, requests.RequestException) as error:
            pytest.skip(f"the definition of {kind} cannot be had from {url}: {type(error).__name__}")
        definition = yaml.load(Path(path).read_text(), yaml.CSafeLoader)
        (version,) = (each for each in definition["spec"]["versions"] if each["storage"])
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        made[kind] = jsonschema.Draft202012Validator(schema)
    return made


@pytest.mark.parametrize("root", ROOTS)
def test_the_operators_know_every_field(root: str, definitions: dict[str, jsonschema.Draft202012Validator]) -> None:
    for manifest in rendered(root):
        if manifest["kind"] in CUSTOM:
            assert faults(definitions[manifest["kind"]], manifest) == [], manifest["metadata"]["name"]

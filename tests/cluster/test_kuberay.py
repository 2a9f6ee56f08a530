"""The manifests against KubeRay's own schemas, offline.

kuberay_crds.json.gz: openAPIV3Schema of version v1 of RayJob, RayCronJob and RayService, without
descriptions and status, from config/crd/bases of the Go module
github.com/ray-project/kuberay/ray-operator v1.6.2 (Apache-2.0).
"""

import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator

from infra.ray_runtime import ENVIRONMENT
from infra.settings import Settings, is_secret, load_settings

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "cluster" / "kuberay"
RAY_KINDS = {"train.yaml": "RayJob", "refresh.yaml": "RayCronJob", "serve.yaml": "RayService"}


@pytest.fixture(scope="module")
def schemas():
    with gzip.open(Path(__file__).with_name("kuberay_crds.json.gz")) as file:
        return {kind: strict(schema) for kind, schema in json.load(file).items()}


def strict(schema):
    """A misspelt key is an error, where Kubernetes would drop it in silence."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        free = schema.get("x-kubernetes-preserve-unknown-fields", False)
        found["additionalProperties"] = free
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


def load(name):
    return yaml.safe_load((MANIFESTS / name).read_text())


def faults(schemas, manifest):
    body = {key: value for key, value in manifest.items() if key != "metadata"}
    found = Draft202012Validator(schemas[manifest["kind"]]).iter_errors(body)
    return [f"{'.'.join(map(str, fault.path))}: {fault.message[:200]}" for fault in found]


def ray_clusters():
    yield load("train.yaml")["spec"]["rayClusterSpec"]
    yield load("refresh.yaml")["spec"]["jobTemplate"]["rayClusterSpec"]
    yield load("serve.yaml")["spec"]["rayClusterConfig"]


def pods():
    for cluster in ray_clusters():
        yield cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster.get("workerGroupSpecs", []):
            yield group["template"]["spec"]


@pytest.mark.parametrize("name", RAY_KINDS)
def test_kuberay_accepts_it(schemas, name):
    manifest = load(name)
    assert manifest["kind"] == RAY_KINDS[name]
    assert faults(schemas, manifest) == []


def test_a_misspelt_key_would_be_found(schemas):
    manifest = load("train.yaml")
    manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["contaners"] = []
    assert "contaners" in faults(schemas, manifest)[0]


def test_every_cluster_asks_for_the_token_and_runs_our_ray():
    for cluster in ray_clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "dpdl-ray-token"}
        assert cluster["rayVersion"] == ray.__version__


def test_secrets_are_files_and_every_variable_is_a_setting(tmp_path):
    mounted = tmp_path / "secret"
    mounted.write_text("x")
    mounted.chmod(0o440)
    settings_file = tmp_path / "dpdl.yaml"
    config, policy = yaml.safe_load_all((MANIFESTS / "settings.yaml").read_text())
    settings_file.write_text(config["data"]["dpdl.yaml"])
    for pod in pods():
        (container,) = pod["containers"]
        environ = {each["name"]: each["value"] for each in container["env"]}
        assert not any(is_secret(name) for name in environ)
        environ |= {name: str(mounted) for name in environ if name.endswith("_FILE")}
        environ["DPDL_CONFIG"] = str(settings_file)
        assert isinstance(load_settings(environ), Settings)
        requests = container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(requests)
        assert container["resources"]["limits"] == requests
    assert policy["kind"] == "NetworkPolicy"


def test_no_service_sets_variables_of_the_pods():
    """KubeRay makes dpdl-serve-svc, whose DPDL_SERVE_SVC_PORT would be taken for a setting."""
    assert all(pod["enableServiceLinks"] is False for pod in pods())


def test_the_pods_that_submit_jobs_may_reach_the_dashboard_and_nothing_else():
    """KubeRay 1.6.2 labels the Job (rayjob_controller.go); its pods have Kubernetes' own label."""
    _, policy = yaml.safe_load_all((MANIFESTS / "settings.yaml").read_text())
    allowed = [
        [port["port"] for port in rule.get("ports", [])]
        for rule in policy["spec"]["ingress"]
        for peer in rule.get("from", [])
        if selects(peer.get("podSelector", {}), {"batch.kubernetes.io/job-name": "dpdl-train-x"})
    ]
    assert allowed == [[8265]]


def selects(selector, labels):
    """Whether a label selector of Kubernetes chooses a pod with these labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    rules = selector.get("matchExpressions", [])
    assert all(rule["operator"] == "Exists" for rule in rules)
    return wanted and all(rule["key"] in labels for rule in rules)


def test_no_bound_promises_pods_that_only_an_autoscaler_would_add():
    for cluster in ray_clusters():
        assert "enableInTreeAutoscaling" not in cluster
        for group in cluster.get("workerGroupSpecs", []):
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_a_cluster_has_somewhere_to_work():
    """On its workers, or on the head where there are none; what is said of the head is so."""
    for name, cluster in zip(RAY_KINDS, ray_clusters(), strict=True):
        head = cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]
        assert (head == "0") == bool(cluster.get("workerGroupSpecs")), name
        text = (MANIFESTS / name).read_text()
        assert ("No tasks on the head" in text) == (head == "0"), name


def test_serve_deploys_what_serve_config_says():
    ours = yaml.safe_load((ROOT / "serving" / "serve_config.yaml").read_text())
    theirs = yaml.safe_load(load("serve.yaml")["spec"]["serveConfigV2"])
    # KubeRay deploys as soon as the head runs: a device that is not named would be its CPU.
    ours["applications"][0]["args"]["device"] = "cuda"
    assert theirs == ours


def test_prometheus_finds_every_pod_of_the_stream_as_it_does_without_kubernetes():
    monitor = load("watch.yaml")["spec"]
    cluster = load("serve.yaml")["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert selects(monitor["selector"], group["template"]["metadata"]["labels"])
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    ours = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = ours["scrape_configs"]
    assert [
        {"target_label": each["targetLabel"], "replacement": each["replacement"]}
        for each in endpoint["relabelings"]
    ] == scrape["relabel_configs"]
    assert endpoint["metricRelabelings"] == scrape["metric_relabel_configs"]


def test_the_command_of_the_docs_makes_our_rules_a_prometheus_rule():
    docs = (ROOT / "docs" / "watching.md").read_text()
    (command,) = re.findall(r"^    (\(printf .*) \| kubectl apply -f -$", docs, re.M | re.S)
    made = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    rules = yaml.safe_load((ROOT / "infra" / "prometheus" / "dpdl.rules.yml").read_text())
    rule = yaml.safe_load(made)
    assert (rule["kind"], rule["spec"]) == ("PrometheusRule", rules)


def test_the_image_starts_ray_as_the_machine_here_does():
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    for name, value in ENVIRONMENT.items():
        assert f" {name}={value}" in dockerfile

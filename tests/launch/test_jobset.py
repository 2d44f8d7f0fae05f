"""JobSet manifests against the schema of JobSet's own custom resource definition, with every object closed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

from tests.launch.jobs import JOBSET, job, spec  # noqa: E402

TPU = JOBSET.replace(topology="4x4x4", queue="research")
JOBS = {
    "cpu": job(spec(JOBSET)),
    "gpu": job(spec(JOBSET, nodes=4, chips_per_node=8, accelerator="nvidia-h100-80gb", minutes=60)),
    "tpu": job(spec(TPU, nodes=16, chips_per_node=4, accelerator="tpu-v5p-slice")),
    "sweep": job(spec(JOBSET, sweep=("seed=1,2",)), 2),
}


@pytest.fixture(scope="session")
def validator(pytestconfig: pytest.Config) -> Any:
    path = Path(pytestconfig.getoption("--jobset-schema"))
    if not path.is_file():
        pytest.skip(f"JobSet's custom resource definition is not at {path}: give it with --jobset-schema PATH")
    definition = yaml.safe_load(path.read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1alpha2"]
    schema = version["schema"]["openAPIV3Schema"]
    closed(schema)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"]["apiVersion"]["enum"] = [f"{definition['spec']['group']}/v1alpha2"]
    schema["properties"]["kind"]["enum"] = [definition["spec"]["names"]["kind"]]
    return jsonschema.Draft202012Validator(schema)


def closed(schema: Any) -> None:
    """Makes a schema refuse what it does not name, and says in JSON's own words what Kubernetes says in its own."""
    if isinstance(schema, list):
        for part in schema:
            closed(part)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string") is True:
        schema.pop("type", None)
    for part in schema.values():
        closed(part)


def faults(validator: Any, manifest: dict[str, Any]) -> str:
    return "\n".join(f"{fault.json_path}: {fault.message[:200]}" for fault in validator.iter_errors(manifest))


def manifests(name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in JOBS[name].spec.platform.render(JOBS[name]).values()]


@pytest.mark.parametrize("name", JOBS)
def test_a_manifest_is_what_the_cluster_takes(validator: Any, name: str) -> None:
    for manifest in manifests(name):
        # The schema leaves `metadata` to Kubernetes itself.
        assert manifest["metadata"].keys() <= {"name", "namespace", "labels", "annotations"}
        assert faults(validator, {**manifest, "metadata": {}}) == ""


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "replicatedJobs", 0, "replcias"),
        ("spec", "failurePolicy", "rules", 0, "onReasons"),
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "comand"),
    ],
    ids=lambda path: path[-1],
)
def test_the_schema_refuses_a_slip(validator: Any, path: tuple[Any, ...]) -> None:
    manifest = copy.deepcopy(manifests("gpu")[0])
    place: Any = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 1
    assert path[-1] in faults(validator, manifest)


def test_a_value_of_another_kind_is_refused(validator: Any) -> None:
    manifest = copy.deepcopy(manifests("gpu")[0])
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Requeue"
    assert "'Requeue' is not one of" in faults(validator, manifest)


def test_preemption_and_failure_are_told_apart() -> None:
    """A pod that saved, or whose machine is taken, fails its Job for a reason that the JobSet does not count."""
    (manifest,) = manifests("tpu")
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
    inner = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    saved, taken = inner["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"]["values"] == [75, 143] and saved["action"] == taken["action"] == "FailJob"
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert inner["backoffLimit"] == 0 and inner["template"]["spec"]["restartPolicy"] == "Never"


def test_pods_find_each_other() -> None:
    """Those of a TPU slice are told by GKE; the others by the name of the first pod in the JobSet's own domain."""
    (tpu,), (gpu,) = manifests("tpu"), manifests("gpu")
    container = lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]  # noqa: E731
    assert container(tpu)["env"] == []
    told = {variable["name"]: variable for variable in container(gpu)["env"]}
    name, domain = gpu["metadata"]["name"], gpu["spec"]["network"]["subdomain"]
    assert told["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-workers-0-0.{domain}:8476"
    assert (
        told["JAX_NUM_PROCESSES"]["value"]
        == "4"
        == str(gpu["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"])
    )
    assert "job-completion-index" in told["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]

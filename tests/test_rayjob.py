"""rayjob.yaml against a typed model of the fields that it uses, and for what it promises: closed to others, scales to zero, grace."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config_file import load

ROOT = Path(__file__).parents[1]
Labels = dict[str, str]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$")]


class Strict(BaseModel):
    """Fields of KubeRay's ray.io/v1 and of Kubernetes' core API, under their own names."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SecretKey(Strict):
    name: str
    key: str


class SecretSource(Strict):
    secretKeyRef: SecretKey


class Variable(Strict):
    name: str
    value: str | None = None
    valueFrom: SecretSource | None = None


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Mount(Strict):
    name: str
    mountPath: str


class Container(Strict):
    name: str
    image: str
    workingDir: str
    env: list[Variable]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: str


class Memory(Strict):
    medium: Literal["Memory"]
    sizeLimit: Quantity


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: Memory | None = None


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class Pod(Strict):
    restartPolicy: Literal["Never"]
    containers: list[Container]
    volumes: list[Volume]
    terminationGracePeriodSeconds: int = 30
    nodeSelector: Labels = {}
    tolerations: list[Toleration] = []


class Labelled(Strict):
    labels: Labels


class PodTemplate(Strict):
    metadata: Labelled
    spec: Pod


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP"]
    rayStartParams: Labels
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: Labels
    template: PodTemplate


class Auth(Strict):
    mode: Literal["token"]
    secretName: str | None = None


class Autoscaler(Strict):
    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: int
    resources: Resources


class Password(Strict):
    valueFrom: SecretSource


class GcsFaultTolerance(Strict):
    redisAddress: str
    redisPassword: Password


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: Auth
    enableInTreeAutoscaling: bool
    autoscalerOptions: Autoscaler
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    gcsFaultToleranceOptions: GcsFaultTolerance | None = None


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec


class Named(Strict):
    name: str


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: JobSpec


TEXT = (ROOT / "rayjob.yaml").read_text()


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(TEXT))


@pytest.fixture(scope="module")
def job(documents) -> JobSpec:
    return RayJob.model_validate(documents[0]).spec


def pods(job: JobSpec) -> list[Pod]:
    cluster = job.rayClusterSpec
    return [cluster.headGroupSpec.template.spec, *(group.template.spec for group in cluster.workerGroupSpecs)]


def test_a_field_that_is_not_there_or_has_another_type_is_refused(documents):
    for path, value in (
        (("spec", "rayClusterSpec", "authOption"), {"mode": "token"}),
        (("spec", "rayClusterSpec", "authOptions"), {"mode": "disabled"}),
        (("spec", "rayClusterSpec", "headGroupSpec", "serviceType"), "LoadBalancer"),
        (("spec", "backoffLimit"), "10"),
    ):
        broken = copy.deepcopy(documents[0])
        node = broken
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        with pytest.raises(ValidationError, match=path[-1]):
            RayJob.model_validate(broken)


def test_what_is_commented_out_fits_too(documents):
    """The section on GCS fault tolerance, with the comment signs taken away."""
    lines = [line for line in TEXT.splitlines() if re.match(r"    # (gcsFault|  )", line)]
    extra = yaml.safe_load("\n".join(line.replace("    # ", "", 1) for line in lines))
    whole = copy.deepcopy(documents[0])
    whole["spec"]["rayClusterSpec"] |= extra
    options = RayJob.model_validate(whole).spec.rayClusterSpec.gcsFaultToleranceOptions
    assert options is not None
    assert options.redisPassword.valueFrom.secretKeyRef.key == "password"


def test_nobody_gets_in_without_the_token_or_from_outside(job, documents):
    assert job.rayClusterSpec.authOptions.mode == "token"
    assert job.rayClusterSpec.headGroupSpec.serviceType == "ClusterIP"
    assert not re.search(r"0\.0\.0\.0|LoadBalancer|NodePort|Ingress$", TEXT, re.MULTILINE)
    assert not re.search(r"RAY_AUTH_TOKEN\b.*value:|auth_token: \S|[0-9a-f]{32}", TEXT)
    policy = documents[1]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    labels = policy["podSelector"]["matchLabels"]
    cluster = job.rayClusterSpec
    for template in (cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)):
        assert labels.items() <= template.metadata.labels.items(), "the policy is for all pods of the cluster"
    assert all(set(source) <= {"podSelector", "namespaceSelector"} for source in policy["ingress"][0]["from"])


def test_workers_scale_from_zero_and_back(job):
    cluster = job.rayClusterSpec
    assert cluster.enableInTreeAutoscaling
    assert cluster.autoscalerOptions.version == "v2"
    assert 60 <= cluster.autoscalerOptions.idleTimeoutSeconds <= 1800
    assert [(g.replicas, g.minReplicas, g.maxReplicas) for g in cluster.workerGroupSpecs] == [(0, 0, 8)]
    assert job.shutdownAfterJobFinishes


def test_a_worker_has_time_to_save_before_its_pod_is_killed(job):
    for group in job.rayClusterSpec.workerGroupSpecs:
        pod = group.template.spec
        drain = {v.name: v.value for v in pod.containers[0].env}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert drain is not None
        assert 60 <= float(drain) <= pod.terminationGracePeriodSeconds - 10


def test_storage_is_shared_by_all_pods(job):
    storage = load(ROOT / "jobs" / "configs" / "dpo-7b-zero3.yaml").storage
    for pod in pods(job):
        shared = {volume.name for volume in pod.volumes if volume.persistentVolumeClaim}
        mounts = [mount.mountPath for mount in pod.containers[0].volumeMounts if mount.name in shared]
        assert any(storage.startswith(f"{mount}/") for mount in mounts)
        assert {mount.name for mount in pod.containers[0].volumeMounts} == {volume.name for volume in pod.volumes}


def test_the_entrypoint_is_a_configuration_that_the_cluster_can_hold(job):
    words = shlex.split(job.entrypoint)
    assert words[:3] == ["python", "-m", "jobs.train"]
    scaling = load(ROOT / words[3], words[4:]).scaling
    assert (scaling.least_workers, scaling.most_workers) == (4, 8)
    (group,) = job.rayClusterSpec.workerGroupSpecs
    limits = group.template.spec.containers[0].resources.limits
    per_pod = min(
        int(limits["nvidia.com/gpu"]) // scaling.gpus_per_worker, int(limits["cpu"]) // scaling.cpus_per_worker
    )
    assert per_pod * group.maxReplicas >= scaling.most_workers


def test_versions_are_the_pinned_ones(job):
    pins = (ROOT / "requirements" / "base.lock").read_text().splitlines()
    ray = next(pin.partition("==")[2] for pin in pins if pin.startswith("ray=="))
    assert job.rayClusterSpec.rayVersion == ray
    assert f"rayproject/ray:{ray}-py311" in TEXT
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch
    assert f"pip install {torch[1]} " in TEXT

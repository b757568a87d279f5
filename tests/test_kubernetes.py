"""examples/kubernetes/train.yaml has the fields of its resources, and its commands parse.

No cluster is used. The fields are those of the Kubeflow training operator's v1 API and of
Kubernetes' core API; others are refused there only as a warning, or dropped in silence.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from openpalm.base.settings import parse
from openpalm.parallel.config import axes_of
from openpalm.train.config import TrainSettings

FILE = Path(__file__).resolve().parent.parent / "examples" / "kubernetes" / "train.yaml"

# A type; or a list of one kind; or a mapping of fields; or "*" for names that the user chooses.
METADATA = {"name": str}
POD = {
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsUser": int, "fsGroup": int},
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
            "resources": {"limits": {"*": int}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str},
        }
    ],
}
KINDS = {
    ("v1", "PersistentVolumeClaim"): {
        "metadata": METADATA,
        "spec": {"accessModes": [str], "resources": {"requests": {"storage": str}}},
    },
    ("kubeflow.org/v1", "PyTorchJob"): {
        "metadata": METADATA,
        "spec": {
            "elasticPolicy": {
                "rdzvBackend": str,
                "minReplicas": int,
                "maxReplicas": int,
                "nProcPerNode": int,
                "maxRestarts": int,
            },
            "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": int,
                    "restartPolicy": str,
                    "template": {"spec": POD},
                },
            },
        },
    },
}
CHOICES = {
    "cleanPodPolicy": {"Running", "All", "None"},
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "rdzvBackend": {"c10d", "etcd", "etcd-v2"},
    "medium": {"", "Memory"},
}


def check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, schema[0], f"{where}[{number}]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), where
        for name, item in value.items():
            assert name in schema or "*" in schema, f"{where}.{name}"
            check(item, schema.get(name, schema.get("*")), f"{where}.{name}")
    else:
        assert type(value) is schema, where
        allowed = CHOICES.get(where.rpartition(".")[2])
        assert allowed is None or value in allowed, where


def resources() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all(FILE.read_text(encoding="utf-8"))
    return {resource["kind"]: resource for resource in found}


def worker() -> dict[str, Any]:
    return resources()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]


def test_fields_are_those_of_the_api():
    assert {(r["apiVersion"], r["kind"]) for r in resources().values()} == KINDS.keys()
    for resource in resources().values():
        rest = {k: v for k, v in resource.items() if k not in ("apiVersion", "kind")}
        check(rest, KINDS[resource["apiVersion"], resource["kind"]], resource["kind"])


@pytest.mark.parametrize("wrong", [{"restartpolicy": "OnFailure"}, {"restartPolicy": "Sometimes"}])
def test_a_wrong_field_is_found(wrong: dict[str, str]):
    schema = KINDS["kubeflow.org/v1", "PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    with pytest.raises(AssertionError):
        check(wrong, schema, "Worker")


def test_names_match():
    spec = worker()["template"]["spec"]
    (container,) = spec["containers"]
    assert container["name"] == "pytorch"  # the operator's
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    claim = volumes["openpalm"]["persistentVolumeClaim"]["claimName"]
    assert claim == resources()["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_command_is_ours():
    from torch.distributed.run import get_args_parser

    policy = resources()["PyTorchJob"]["spec"]["elasticPolicy"]
    (container,) = worker()["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    given = get_args_parser().parse_args(container["args"])
    assert given.module
    assert given.training_script == "openpalm"
    assert given.training_script_args[0] == "train"
    words = given.training_script_args[1:]
    settings = parse(TrainSettings, words, verb="train", about="", examples=[])
    assert policy["minReplicas"] == policy["maxReplicas"] == worker()["replicas"]
    assert policy["nProcPerNode"] == container["resources"]["limits"]["nvidia.com/gpu"]
    axes_of(settings.parallel, worker()["replicas"] * policy["nProcPerNode"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(str(path).startswith(mounts[0]) for path in (settings.data, settings.out))


def test_there_is_time_to_save():
    spec = worker()["template"]["spec"]
    (container,) = spec["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    (grace,) = (a for a in container["args"] if a.startswith("--parallel.grace-s="))
    saved, killed = float(grace.split("=")[1]), int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert saved < killed < spec["terminationGracePeriodSeconds"]

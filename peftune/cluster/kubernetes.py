"""A job as Kubernetes manifests: a file of launch/kubernetes/ with its own names and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from peftune.cluster.job import LONGEST_NAME, Job
from peftune.config.load import dump
from peftune.errors import Fault, MachineError
from peftune.parallel.launcher import presets

KINDS = ("job", "jobset", "trainjob")
"""Plain Kubernetes, the JobSet controller, Kubeflow Trainer: the files of launch/kubernetes/."""
PORT = 29500
CONFIG = "/etc/peftune/config.yaml"
"""Where the pods find the config, which a ConfigMap carries."""
NO_IMAGE, NO_CLAIM = "IMAGE-WITH-PEFTUNE", "A-CLAIM-THAT-ALL-PODS-SHARE"
"""Where none is given: names of images and claims have no capital letters, so a cluster refuses these."""

Manifest = dict[str, Any]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and every list in full rather than as a reference to an equal one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))


def manifests(job: Job, *, kind: str, image: str, claim: str, mount: str, python: str = "python3",
              interface: str | None = None, cpu: str | None = None, memory: str | None = None) -> list[Manifest]:
    """The objects that run `job`.

    Args:
        job: what is to run; its config travels with every override applied.
        kind: one of KINDS.
        image: of the containers; it has peftune.
        claim: name of a PersistentVolumeClaim that all pods can write to.
        mount: where they mount it; relative paths of the config begin there.
        python: in the image.
        interface: of the network between the pods.
        cpu, memory: of each pod, which are reserved for it; None reserves nothing.

    Raises:
        MachineError: the run's output would be lost with its pod, or a quantity is none.
    """
    _check_kept(job, mount)
    job = replace(job, name=_service_name(job.name))
    reserved = _quantities(cpu, memory)
    found: list[Manifest] = list(yaml.safe_load_all((presets("kubernetes") / f"{kind}.yaml").read_text("utf-8")))
    workload = found[-1]
    for manifest in found:
        manifest["metadata"]["name"] = job.name
    _one(found, "ConfigMap")["data"] = {"config.yaml": dump(job.config)}
    first_pod = {"job": "0", "jobset": "nodes-0-0", "trainjob": "node-0-0"}[kind]
    words = [python, "-m", "peftune", *job.train_words(
        [CONFIG], rank="$(JOB_COMPLETION_INDEX)", main=f"{job.name}-{first_pod}.{job.name}:{PORT}")]
    if interface is not None:
        words += ["--interface", interface]
    match kind:
        case "job":
            _one(found, "Service")["spec"]["selector"] = {"batch.kubernetes.io/job-name": job.name}
            workload["spec"]["backoffLimit"] = 3 * job.nodes
            _fill_job(workload["spec"], job, words, image, reserved)
            workload["spec"]["template"]["spec"]["subdomain"] = job.name
        case "jobset":
            workload["spec"]["network"]["subdomain"] = job.name
            _fill_job(workload["spec"]["replicatedJobs"][0]["template"]["spec"], job, words, image, reserved)
        case _:
            trainer = workload["spec"]["trainer"]
            trainer.update(numNodes=job.nodes, image=image, args=words)
            trainer["command"][2] = trainer["command"][2].replace("/workspace", mount)
            _set_resources(trainer["resourcesPerNode"], job.gpus_per_node, reserved)
    for pod in _pods(workload):
        _share(pod, job.name, claim, mount)
    for container in _containers(workload):
        for variable in container.get("env", []):
            variable["value"] = variable["value"].replace("/workspace", mount)
    return found


def as_yaml(found: list[Manifest]) -> str:
    """The objects as one file for kubectl."""
    return yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _check_kept(job: Job, mount: str) -> None:
    folder = PurePosixPath(mount, job.config.output_dir)  # an absolute output_dir stays what it is
    if not folder.is_relative_to(mount):
        raise MachineError(Fault(kind="environment", message=f"output_dir = {job.config.output_dir} lies outside "
                                 f"{mount}, where the claim is mounted: it would be lost with the pod",
                                 mend=f"output_dir={mount}/runs/..., or a relative path"))


def _service_name(name: str) -> str:
    """Names of Services, and of JobSets, which make one, begin with a letter (RFC 1035), those of hosts need not."""
    return name if name[0].isalpha() else f"peftune-{name}"[:LONGEST_NAME].rstrip("-")


def _one(found: list[Manifest], kind: str) -> Manifest:
    return next(manifest for manifest in found if manifest["kind"] == kind)


def _fill_job(spec: Manifest, job: Job, words: list[str], image: str, reserved: Mapping[str, str]) -> None:
    spec["parallelism"] = spec["completions"] = job.nodes
    container = spec["template"]["spec"]["containers"][0]
    container.update(image=image, command=words)
    _set_resources(container["resources"], job.gpus_per_node, reserved)


def _set_resources(resources: Manifest, gpus: int, reserved: Mapping[str, str]) -> None:
    resources["limits"] = {**({"nvidia.com/gpu": gpus} if gpus else {}), **reserved}
    if reserved:
        resources["requests"] = dict(reserved)


def _quantities(cpu: str | None, memory: str | None) -> dict[str, str]:
    found = {}
    for name, value, form, example in (("cpu", cpu, r"\d+(\.\d+)?m?", "64"),
                                       ("memory", memory, r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)", "500Gi")):
        if value is None:
            continue
        if not re.fullmatch(form, value):
            raise MachineError(Fault(kind="environment", message=f"--{name} {value}: not a quantity of Kubernetes",
                                     mend=f"such as --{name} {example}"))
        found[name] = value
    return found


def _pods(node: Any) -> Iterator[Manifest]:
    """Every pod's spec in a manifest: what has both containers and volumes."""
    if isinstance(node, dict):
        if "containers" in node and "volumes" in node:
            yield node
        for value in node.values():
            yield from _pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pods(value)


def _containers(workload: Manifest) -> Iterator[Manifest]:
    for pod in _pods(workload):
        yield from pod["containers"]
    if "trainer" in workload["spec"]:
        yield workload["spec"]["trainer"]


def _share(pod: Manifest, name: str, claim: str, mount: str) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    volumes["config"]["configMap"]["name"] = name
    volumes["shared"]["persistentVolumeClaim"]["claimName"] = claim
    for container in pod["containers"]:
        if "workingDir" in container:
            container["workingDir"] = mount
        next(place for place in container["volumeMounts"] if place["name"] == "shared")["mountPath"] = mount

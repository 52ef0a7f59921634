"""The files of cluster/: valid for Ray, KubeRay and docker, and closed to the world."""

from __future__ import annotations

import copy
import json
import re
import stat
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.main import get_command

import raymask
from raymask.cli import app
from raymask.config import load_spec

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = ROOT.parent / "shared" / "kuberay"
PIN_FILE = CLUSTER / "versions.env"
PINS = dict(line.split("=", 1) for line in PIN_FILE.read_text().splitlines() if not line.startswith("#"))
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path != PIN_FILE)
LAUNCHERS = ["onprem", "aws", "gcp"]
MANIFESTS = ["raycluster", "rayjob"]
SCRIPTS = ["local/up", "local/down"]
GUIDES = ["local", *LAUNCHERS, "kuberay", "docker"]
DOCKERFILE = (CLUSTER / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@cache
def rendered(name: str) -> str:
    return subprocess.check_output([CLUSTER / "render", CLUSTER / name], text=True)


def launcher(name: str) -> Any:
    return yaml.safe_load(rendered(f"{name}/cluster.yaml"))


def manifest(name: str) -> Any:
    return yaml.safe_load(rendered(f"kuberay/{name}.yaml"))


def ray_cluster(name: str) -> Any:
    """The part of either manifest that describes a RayCluster."""
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name: str) -> list[Any]:
    spec = ray_cluster(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(value, Mapping):
        yield from value.items()
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from entries(inner)


def commands(guide: str) -> list[list[str]]:
    """The commands in each of a README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (CLUSTER / guide / "README.md").read_text(), re.DOTALL)
    return [block.replace("\\\n", " ").strip().splitlines() for block in blocks]


# Versions


def test_versions_are_pinned_in_one_place() -> None:
    for path in FILES:
        text = path.read_text()
        assert [value for value in PINS.values() if value in text] == [], path
        known = PINS.keys() | {"VARIANT"} if path.name == "Dockerfile" else PINS.keys()
        if path.suffix == ".yaml" or path.name == "Dockerfile":
            assert set(re.findall(r"\$\{(\w*)", text)) <= known, path


def test_rendering_fills_in_the_versions_and_leaves_the_variables_of_the_nodes() -> None:
    for path in CLUSTER.rglob("*.yaml"):
        text = rendered(str(path.relative_to(CLUSTER)))
        assert set(re.findall(r"\$\w+|\$\{.*?\}", text)) <= {"$RAY_HEAD_IP"}, path
        assert f"{PINS['IMAGE']}:{PINS['RAYMASK_VERSION']}-" in text
    assert "$RAY_HEAD_IP" in rendered("aws/cluster.yaml")


def test_versions_agree_with_the_project() -> None:
    wanted = {need.name: need.specifier for need in map(Requirement, PROJECT["dependencies"])}
    for package in ("ray", "torch", "transformers"):
        assert PINS[f"{package.upper()}_VERSION"] in wanted[package], package
    assert PINS["RAYMASK_VERSION"] == raymask.__version__
    assert PINS["PYTHON"].replace("py3", "3.") in SpecifierSet(PROJECT["requires-python"])


# Manifests


@pytest.fixture(params=MANIFESTS)
def crd(request: pytest.FixtureRequest) -> tuple[Any, jsonschema.Draft7Validator]:
    """A manifest, and KubeRay's strict schema for it from the folder beside the repository."""
    schema = KUBERAY / f"{request.param}.v1.schema.json"
    if not schema.is_file():
        pytest.skip(f"there is no schema at {schema}")
    assert f"v{PINS['KUBERAY_VERSION']}" in (KUBERAY / "README.md").read_text()
    return manifest(request.param), jsonschema.Draft7Validator(json.loads(schema.read_text()))


def test_manifests_are_what_kuberay_takes(crd: tuple[Any, jsonschema.Draft7Validator]) -> None:
    document, schema = crd
    assert [error.message for error in schema.iter_errors(document)] == []
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"].lower() in MANIFESTS


def test_a_typo_in_a_manifest_is_found(crd: tuple[Any, jsonschema.Draft7Validator]) -> None:
    document, schema = crd
    for key, value in (("maxReplica", 8), ("maxReplicas", "8"), ("minReplicas", None)):
        broken = copy.deepcopy(document)
        spec = broken["spec"].get("rayClusterSpec", broken["spec"])
        spec["workerGroupSpecs"][0][key] = value
        assert len(list(schema.iter_errors(broken))) == 1, key
    broken = copy.deepcopy(document)
    broken["spec"]["shutdownAfterJobFinish"] = True
    assert len(list(schema.iter_errors(broken))) == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_grow_from_no_gpu_node_and_keep_candidates_off_the_head(name: str) -> None:
    spec = ray_cluster(name)
    head, gpu = groups(name)
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert gpu["replicas"] == gpu["minReplicas"] == 0 < gpu["maxReplicas"]
    for group in (head, gpu):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]  # noqa: S108 - it is the path
        assert shm["emptyDir"]["medium"] == "Memory"
        memory, store = container["resources"]["limits"]["memory"], shm["emptyDir"]["sizeLimit"]
        assert int(store.removesuffix("Gi")) >= 0.3 * int(memory.removesuffix("Gi"))  # else Ray's store is on disk
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_job_goes_away_and_goes_on_after_a_lost_head() -> None:
    spec = manifest("rayjob")["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0
    assert "--address auto --run s3://" in spec["entrypoint"]
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "spec")
    assert f"raymask search {mount['mountPath']}/spec.yaml " in spec["entrypoint"]
    assert "configmap raymask --from-file=spec.yaml=" in commands("kuberay")[0][0]


# The launcher


def launcher_schema() -> jsonschema.Draft7Validator:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    schema = Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json"
    return jsonschema.Draft7Validator(json.loads(schema.read_text()))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_what_ray_takes(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config

    schema, config = launcher_schema(), launcher(name)
    assert [error.message for error in schema.iter_errors(config)] == []
    prepared = prepare_config(copy.deepcopy(config))
    assert [error.message for error in schema.iter_errors(prepared)] == []
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == []  # Ray's own would install Ray
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in prepared["head_start_ray_commands"][-1]
    assert any(option.startswith("--shm-size=") for option in prepared["docker"]["run_options"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_typo_in_a_launcher_file_is_found(name: str) -> None:
    schema = launcher_schema()
    for wrong in ({"max_wrokers": 8}, {"max_workers": "8"}, {"docker": {"shm_size": "8g"}}):
        assert len(list(schema.iter_errors(launcher(name) | wrong))) == 1, wrong


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_grow_from_no_gpu_node_at_a_spot_price(name: str) -> None:
    config = launcher(name)
    head, gpu = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert head["resources"]["CPU"] == 0
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= config["max_workers"]
    spot = {("MarketType", "spot"), ("preemptible", True)}
    assert spot & {(key, value) for key, value in entries(gpu) if isinstance(value, str | bool)}
    assert not spot & {(key, value) for key, value in entries(head) if isinstance(value, str | bool)}
    assert name == "aws" or gpu["resources"].keys() == {"CPU", "GPU", "memory"}  # all that a worker asks for


# Security


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_clusters_have_tokens_and_closed_dashboards(name: str) -> None:
    config = launcher(name)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert " --dashboard-host=127.0.0.1 " in config["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in rendered(f"{name}/cluster.yaml")  # noqa: S104 - that nothing binds to it


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_tokens_closed_services_and_no_privileges(name: str) -> None:
    spec = ray_cluster(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    text = rendered(f"kuberay/{name}.yaml")
    for word in ("LoadBalancer", "NodePort", "Ingress", "privileged:", "hostNetwork", "hostPath", "hostPort"):
        assert word not in text, word
    bound = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert spec["autoscalerOptions"]["securityContext"] == bound
    for group in groups(name):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert all(container["securityContext"] == bound for container in pod["containers"])


def test_no_file_carries_a_secret() -> None:
    for path in FILES:
        assert not re.search(
            r"AKIA|PRIVATE KEY|(?i:password|secret_access_key|token) *[:=] *['\"]?\w{16,}", path.read_text()
        )


# The image


def test_the_image_is_pinned_by_its_arguments() -> None:
    declared = set(re.findall(r"\b([A-Z_]+)\b", " ".join(re.findall(r"^ARG (.*)$", DOCKERFILE, re.MULTILINE))))
    assert declared <= PINS.keys() | {"VARIANT"}
    first = re.search(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE)
    assert first is not None
    assert first[1] == "rayproject/ray:${RAY_VERSION}-${PYTHON}-${VARIANT}"
    before, after = DOCKERFILE.split(first[0])
    assert set(re.findall(r"\$\{(\w+)\}", first[1])) <= set(re.findall(r"\w+", before.split("ARG ")[1]))
    inside = re.findall(r"\w+", "".join(re.findall(r"^ARG (.*)$", after, re.MULTILINE)))
    assert set(re.findall(r"\$\{(\w+)\}", after)) == set(inside)  # an argument ends at FROM unless it is named again
    assert "USER" not in DOCKERFILE.split()  # the base image's is not root


def test_what_the_image_copies_is_in_the_repository_and_in_the_context() -> None:
    ignored = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = [
        source
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    assert "raymask" in copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert PROJECT["readme"] in copied  # the build reads it


# Scripts and guides


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_bash(name: str) -> None:
    path = CLUSTER / name
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text().startswith("#!/usr/bin/env bash\n# ")
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_has_its_three_commands(guide: str) -> None:
    blocks = commands(guide)
    assert blocks
    for block in blocks:
        assert len(block) == 3, block
        subprocess.run(["bash", "-n"], input="\n".join(block), text=True, check=True)
        named = re.findall(r"\b(?:cluster|jobs)/[\w./-]+", " ".join(block))
        assert named
        assert all((ROOT / path).exists() for path in named), named
    assert f"]({guide}/README.md)" in (CLUSTER / "README.md").read_text()


def test_what_the_guides_type_exists() -> None:
    texts = [*(line for guide in ["", *GUIDES] for block in commands(guide) for line in block)]
    texts.append(manifest("rayjob")["spec"]["entrypoint"])
    subcommands = get_command(app).commands
    found = set()
    for command, words in re.findall(r"\braymask (\w+) ([^;&#]*)", "\n".join(texts)):
        if command in subcommands:
            found.add(command)
            options = {option for parameter in subcommands[command].params for option in parameter.opts}
            assert set(re.findall(r"(?<=\s)--[a-z-]+", words)) <= options, words
            load_spec(ROOT / "jobs" / "bert-base-16x.yaml", re.findall(r"--set (\S+)", words))
    assert found == {"check", "search", "submit"}

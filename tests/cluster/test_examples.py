"""Files of examples/: each is what the tool that reads it takes, as far as that tool is here."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

from lfm2_fast.cluster.scale import Scale  # noqa: E402
from lfm2_fast.hf.load import load  # noqa: E402
from lfm2_fast.server.run import create_app  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KUBERAY = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
CONFIGS = {
    "serve.yaml": yaml.safe_load((EXAMPLES / "serve.yaml").read_text()),
    "kuberay.yaml": yaml.safe_load(KUBERAY["spec"]["serveConfigV2"]),
}


def tool(name: str) -> str:
    """Path of a program; skips where it is not installed."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `make test-cluster` has it")
    return found


def checked(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_the_arguments_of_an_application_exist(name: str) -> None:
    (one,) = CONFIGS[name]["applications"]
    module, _, function = one["import_path"].partition(":")
    assert (EXAMPLES.parent / f"{module.replace('.', '/')}.py").is_file() and function == "build"
    known = {"drain", *(field.name for field in dataclasses.fields(Scale))}
    for called in (create_app, load):
        known |= {*inspect.signature(called).parameters}
    assert one["args"].keys() <= known
    Scale(**{key: value for key, value in one["args"].items() if key in Scale.__annotations__})


@pytest.mark.parametrize("name", CONFIGS)
def test_ray_serve_takes_its_config(name: str) -> None:
    pytest.importorskip("ray.serve", reason="`make test-cluster` installs it")
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema(**CONFIGS[name])
    with pytest.raises(ValueError):
        ServeDeploySchema(**{**CONFIGS[name], "applications": [{"name": "x"}]})


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    checked(tool("hadolint"), EXAMPLES / name)


def test_kubernetes_takes_its_manifests(tmp_path: Path) -> None:
    validate = tool("kubernetes-validate")
    checked(validate, "--strict", EXAMPLES / "kubernetes.yaml")
    # KubeRay's own kind is not among the schemas; the pods in it are Kubernetes' own.
    cluster = KUBERAY["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        file = tmp_path / "pod.yaml"
        file.write_text(yaml.safe_dump(pod))
        checked(validate, "--strict", file)
        pod["spec"]["containerz"] = []
        file.write_text(yaml.safe_dump(pod))
        with pytest.raises(AssertionError):
            checked(validate, "--strict", file)


def test_pods_have_longer_than_the_drain() -> None:
    manifests = [*yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())]
    server: Any = manifests[0]["spec"]["template"]["spec"]
    (drain,) = re.findall(r"--drain=(\d+)", " ".join(server["containers"][0]["args"]))
    wait = int(server["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert server["terminationGracePeriodSeconds"] > int(drain) + wait
    (one,) = CONFIGS["kuberay.yaml"]["applications"]
    for group in KUBERAY["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > one["args"]["drain"]

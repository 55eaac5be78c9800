"""The manifests are what Kubernetes, Slurm and our own commands can read; the wrapper says when a run has finished."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from kimi_jax.training.config import load

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "launch").glob("*.yaml"))
DOCUMENT = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")


def pod(manifest: Path) -> dict:
    (job,) = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"]
    return job["template"]["spec"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests(manifest):
    parsed = yaml.safe_load(manifest.read_text())
    assert (parsed["apiVersion"], parsed["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = pod(manifest)
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    template = spec["template"]["spec"]
    (container,) = template["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["volumes"]}
    assert (ROOT / container["command"][0]).stat().st_mode & 0o100
    workdir, config, *overrides = container["args"]
    assert workdir.startswith(container["volumeMounts"][0]["mountPath"])
    load(ROOT / config.removeprefix("--config="), overrides)  # refuses what is no entry of a config


def test_the_jobset_has_the_hosts_of_its_slice():
    spec = pod(ROOT / "launch" / "jobset.yaml")
    template = spec["template"]["spec"]
    x, y, z = map(int, template["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = template["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert x * y * z == spec["parallelism"] * chips


def test_the_address_is_that_of_the_first_pod():
    manifest = ROOT / "launch" / "processes.yaml"
    parsed, container = yaml.safe_load(manifest.read_text()), pod(manifest)["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, (job,) = parsed["metadata"]["name"], parsed["spec"]["replicatedJobs"]
    assert env["JAX_COORDINATOR_ADDRESS"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert int(env["JAX_NUM_PROCESSES"]) == pod(manifest)["parallelism"]


def test_the_document_names_what_exists():
    modules = set(re.findall(r"python -m (kimi_jax\.\w+)", DOCUMENT))
    assert "kimi_jax.train" in modules
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)
    files = set(re.findall(r"(?:launch|configs|docs)/[\w.]+", DOCUMENT))
    assert {f"launch/{path.name}" for path in (ROOT / "launch").iterdir()} <= files
    assert all((ROOT / file).exists() for file in files), files
    entries = set(re.findall(r"--config\.([\w.]+)=", DOCUMENT))
    config = load(ROOT / "configs" / "debug.py")
    for entry in entries:
        value = config
        for part in entry.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize("script", ["until_finished.sh", "slurm.sh"])
def test_scripts_parse(script):
    shell = (ROOT / "launch" / script).read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", ROOT / "launch" / script], check=True)


RUN = """#!/bin/sh
# stands for python -m kimi_jax.train --workdir FOLDER WHAT
echo "$@" > "$4/arguments"
case "$5" in
    finish) touch "$4/curves.png" ;;
    fail) exit 1 ;;
    stop) trap 'echo saved > "$4/saved"; exit 0' TERM; touch "$4/ready"; while :; do sleep 0.05; done ;;
esac
"""


@pytest.mark.parametrize(("what", "code"), [("finish", 0), ("fail", 1), ("stop", 75)])
def test_until_finished(tmp_path, monkeypatch, what, code):
    stub = tmp_path / "python"
    stub.write_text(RUN)
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(stub))
    workdir = tmp_path / "work dir"
    workdir.mkdir()
    process = subprocess.Popen([ROOT / "launch" / "until_finished.sh", workdir, what])
    if what == "stop":
        deadline = time.monotonic() + 20
        while not (workdir / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code
    assert (workdir / "arguments").read_text() == f"-m kimi_jax.train --workdir {workdir} {what}\n"
    assert (workdir / "saved").exists() == (what == "stop")

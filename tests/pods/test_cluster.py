"""Which processes there are: flags before variables before what JAX detects; half a description is refused."""

from __future__ import annotations

import jax
import pytest

from kimi_jax.errors import UserError
from kimi_jax.pods.cluster import Cluster, Told, find

ENV = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "4"}
SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}
GKE = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,job-0-1.job",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


def test_nothing_said_is_one_process():
    assert find(Told(), 1, {}) is None


def test_flags_and_variables():
    assert find(Told("a:1", 0, 2), 1, {}) == Cluster("a:1", 0, 2)
    assert find(Told(), 1, ENV) == Cluster("host0:1234", 2, 4)
    assert find(Told(process=3), 1, ENV) == Cluster("host0:1234", 3, 4)
    assert find(Told("[::1]:99", 1, 2), 1, {}) == Cluster("[::1]:99", 1, 2)


def test_one_process_is_no_cluster():
    assert find(Told(processes=1), 1, ENV) is None
    assert find(Told("a:1", 0, 1), 1, {}) is None
    assert find(Told(), 1, {"JAX_NUM_PROCESSES": "1"}) is None
    assert find(Told(processes=4), 1, ENV | {"JAX_NUM_PROCESSES": "1"}) == Cluster("host0:1234", 2, 4)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Told("a:1", 0, None), "--processes .or JAX_NUM_PROCESSES. is missing"),
        (Told(None, 0, 2), "--coordinator .or JAX_COORDINATOR_ADDRESS. is missing"),
        (Told("a:1", None, 2), "--process .or JAX_PROCESS_ID. is missing"),
        (Told("a", 0, 2), "HOST:PORT, not 'a'"),
        (Told("a:b", 0, 2), "HOST:PORT, not 'a:b'"),
        (Told("a:65536", 0, 2), "HOST:PORT, not 'a:65536'"),
        (Told("a:1", 2, 2), "below --processes 2, not 2"),
        (Told("a:1", -1, 2), "--process must be a number, not '-1'"),
    ],
)
def test_half_a_description_is_refused(told, message):
    with pytest.raises(UserError, match=message):
        find(told, 1, {})


@pytest.fixture
def not_on_the_cpu():
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


def set_environment(monkeypatch, values):
    for name in (*SLURM, *GKE, "OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_slurm(monkeypatch, not_on_the_cpu):
    set_environment(monkeypatch, SLURM)
    found = find(Told(), 1, {})
    assert found and found.coordinator.startswith("node001:") and (found.process, found.processes) == (3, 4)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (SLURM | {"SLURM_NTASKS": ""}, "SLURM_NTASKS"),
        (SLURM | {"SLURM_PROCID": "node3"}, "SLURM_PROCID"),
        (GKE | {"TPU_WORKER_ID": "one"}, "TPU_WORKER_ID"),
        ({key: value for key, value in GKE.items() if key != "TPU_WORKER_ID"}, "TPU_WORKER_ID"),
    ],
)
def test_a_variable_that_is_no_number_is_named(values, name, monkeypatch, not_on_the_cpu):
    set_environment(monkeypatch, values)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", "TPU_SKIP_MDS_QUERY" in values)
    with pytest.raises(UserError, match=f"cannot be found: {name} must be a number$"):
        find(Told(), 1, {})


def test_two_slices_on_gke(monkeypatch, not_on_the_cpu):
    set_environment(monkeypatch, GKE)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    found = find(Told(), 1, {})
    assert found and found[:3] == ("localhost:8482", 3, 4)  # host 1 of slice 1, of two slices of two hosts


def test_on_the_cpu_nothing_is_detected(monkeypatch):
    set_environment(monkeypatch, SLURM)
    assert find(Told(), 1, {}) is None

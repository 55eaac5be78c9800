"""Which processes a run consists of: told on the command line or by the environment, or found by JAX."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from kimi_jax.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
FLAGS = ("--coordinator", "--process", "--processes")
NUMBERS = (  # that launchers set and JAX reads
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    *("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


class Cluster(NamedTuple):
    """This process's place among the processes of a run."""

    coordinator: str  # HOST:PORT of process 0, as all others reach it
    process: int
    processes: int
    local_device_ids: Sequence[int] | None = None  # None: all that this process sees


class Told(NamedTuple):
    """What the command line says; None is left to the environment."""

    coordinator: str | None = None
    process: int | None = None
    processes: int | None = None


def find(told: Told, seconds: float, env: Mapping[str, str] = os.environ) -> Cluster | None:
    """The processes of this run, or None if this is the only one.

    The command line goes before the variables ``JAX_COORDINATOR_ADDRESS``, ``JAX_PROCESS_ID`` and
    ``JAX_NUM_PROCESSES``, and those before what JAX detects: Cloud TPU VMs, TPUs on GKE (JobSet), Slurm, Open MPI.
    With ``JAX_PLATFORMS=cpu`` nothing is detected, so that a host of a pod can run alone on its CPU.
    """
    given = [_chosen(*pair, env) for pair in zip(told, VARIABLES, strict=True)]
    if str(given[2]) == "1":
        return None
    if any(value is not None for value in given):
        cluster = _explicit(given)
    elif jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        return None
    else:
        cluster = _detected(seconds)
    return cluster if cluster and cluster.processes > 1 else None


def _chosen(told: str | int | None, variable: str, env: Mapping[str, str]) -> str | int | None:
    return told if told is not None else env.get(variable) or None


def _explicit(given: Sequence[str | int | None]) -> Cluster:
    for value, flag, variable in zip(given, FLAGS, VARIABLES, strict=True):
        if value is None:
            raise UserError(f"several processes need {', '.join(FLAGS)}: {flag} (or {variable}) is missing")
    coordinator, *numbers = map(str, given)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator must be HOST:PORT, not {coordinator!r}")
    for number, flag in zip(numbers, FLAGS[1:], strict=True):
        if not number.isdigit():
            raise UserError(f"{flag} must be a number, not {number!r}")
    process, processes = map(int, numbers)
    if process >= processes:
        raise UserError(f"--process counts from 0, so it must be below --processes {processes}, not {process}")
    return Cluster(coordinator, process, processes)


def _detected(seconds: float) -> Cluster | None:
    """What ``jax.distributed.initialize()`` would find; it has no public name of its own, and we need it before."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(seconds))
    except Exception as error:
        read = {"TPU_WORKER_ID": "None", **os.environ}  # what JAX reads where it is missing
        wrong = [name for name in NUMBERS if str(error).endswith(f": {read.get(name)!r}")]
        why = f"{', '.join(wrong)} must be a number" if wrong else error
        raise UserError(f"the other processes of this job cannot be found: {why}") from error
    coordinator, processes, process, local_device_ids = found
    if coordinator is None or processes is None or process is None:
        return None
    return Cluster(coordinator, process, processes, local_device_ids)

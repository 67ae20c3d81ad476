"""Which rank of how many this process is, from the variables of whichever launcher started it."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from megatron_adamba.errors import ConfigError

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""rank, ranks, rank on this machine, ranks on it: Open MPI's mpirun, and MPICH's and Intel MPI's"""
_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
"""srun sets them, and a batch script or a shell of an allocation has none"""
_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PBS_JOBID", "LSB_JOBID")
"""what tells one job of a machine from another"""
_MARK_SECONDS = 60
"""after which a mark that says "told already" is another start's"""
_FIRST_PORT, _PORTS = 15000, 14000
"""below those that systems hand out by themselves"""


def first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that speaks for all; where its variables are wrong, each speaks for itself."""
    if environment.get("RANK", "").strip():
        return environment["RANK"].strip() == "0"
    env = dict(environment)
    try:
        complete_environment(env, quiet=True)
    except ConfigError:
        return True
    return env["RANK"].strip() == "0"


def tells_before_ranks_meet(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what it failed for, before the ranks know of each other: the first rank does, and on a
    machine where it has not said the same, the first process that fails so."""
    first = first_rank(environment)
    if not first:
        # it has the word, where it fails alike
        time.sleep(1)
    job = f"{os.getuid()} {os.getppid()} {environment.get('MASTER_PORT')} {text}"
    mark = Path(tempfile.gettempdir()) / f"adamba-{zlib.crc32(job.encode()):08x}"
    try:
        with open(mark, "x"):
            return True
    except FileExistsError:
        # of a start before this one
        old = time.time() - mark.stat().st_mtime > _MARK_SECONDS
        if old or first:
            os.utime(mark)
        return old or first
    except OSError:
        return first


def complete_environment(env: MutableMapping[str, str] = os.environ, quiet: bool = False) -> None:
    """Fill RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not; an empty variable
    counts as none. Raises ConfigError naming a variable that is no number, or contradicts another."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name, "x").strip():
            del env[name]
    mpi = next((names for names in _MPI if env.get(names[0]) and env.get(names[1])), None)
    # SLURM's own plugin for MPI sets PMI's variables, too; Open MPI's mpirun starts its daemons by srun
    step = any(env.get(name) for name in _STEP)
    if "RANK" in env and "WORLD_SIZE" in env:
        env.setdefault("LOCAL_RANK", env["RANK"])
    elif mpi is not None and _number(env, mpi[1]) > 1 and not (step and mpi is not _MPI[0]):
        _from_mpi(env, *mpi)
    elif step and _slurm_tasks(env) > 1 and env.get("SLURM_PROCID"):
        _from_slurm(env)
    else:
        _alone(env, quiet)
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", str(_port_of_job(env)))
    rank, ranks = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    _number(env, "LOCAL_RANK")
    if not 0 < _number(env, "MASTER_PORT") < 2**16:
        raise ConfigError(f"MASTER_PORT {env['MASTER_PORT']}: must be a port, for example 29500")
    if rank >= ranks:
        raise ConfigError(f"RANK {rank}: must be below WORLD_SIZE {ranks}; start through a launcher")


def _from_mpi(env: MutableMapping[str, str], rank: str, ranks: str, local_rank: str, local_ranks: str) -> None:
    env["RANK"], env["WORLD_SIZE"] = env[rank], env[ranks]
    env["LOCAL_RANK"] = env.get(local_rank) or env[rank]
    if "MASTER_ADDR" not in env and env.get(local_ranks) != env[ranks]:
        raise ConfigError(
            "MASTER_ADDR: is not set, and mpirun does not tell where the first rank runs; start with "
            "mpirun -x MASTER_ADDR=$(hostname) ..."
        )


def _from_slurm(env: MutableMapping[str, str]) -> None:
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(_slurm_tasks(env))
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID") or "0"
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1")


def _alone(env: MutableMapping[str, str], quiet: bool) -> None:
    if not quiet and env.get("SLURM_NTASKS") and _number(env, "SLURM_NTASKS") > 1:
        print(
            f"WARNING: the allocation has {env['SLURM_NTASKS']} tasks, and this process was not started by srun: it "
            f"runs alone; srun adamba train ... runs them all",
            file=sys.stderr,
        )
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = "0", "1", "0"
    env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(_free_port())


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Of this step, which may be smaller than the allocation."""
    name = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if env.get(name)), None)
    return 1 if name is None else _number(env, name)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{name} {text[:40]!r}: must be a number, as launchers set it; unset it to run alone")
    return int(text)


def _port_of_job(env: Mapping[str, str]) -> int:
    """The same on all ranks of a job, and most likely another one for each job of a machine."""
    job = " ".join(env[name] for name in _JOBS if env.get(name))
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS if job else 29500


def first_host(node_list: str) -> str:
    """First name of a SLURM node list: `node[03-07,12]` gives node03, `rack[1-2]n[1,4]-ib` rack1n1-ib."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", node_list)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

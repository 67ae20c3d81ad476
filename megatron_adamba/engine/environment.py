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
from typing import NamedTuple

from megatron_adamba.errors import ConfigError


class _Launcher(NamedTuple):
    """What a launcher calls things, and how a variable is passed on by it."""

    rank: str
    ranks: str
    local_rank: str
    local_ranks: str
    """how many ranks are on this machine"""
    with_address: str


_OPEN_MPI = _Launcher(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "mpirun -x MASTER_ADDR=$(hostname)",
)
_MVAPICH = _Launcher(
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "mpirun_rsh -np N MASTER_ADDR=$(hostname)",
)
_FLUX = _Launcher("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "", "flux run --env=MASTER_ADDR=$(hostname)")
_HYDRA = _Launcher(
    "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpiexec -genv MASTER_ADDR $(hostname)"
)
"""of MPICH and Intel MPI"""
_OF_PALS = ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
"""rank and ranks on this machine, as Cray's launcher names them beside PMI_RANK and PMI_SIZE"""
_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
"""srun sets them, and a batch script or a shell of an allocation has none"""
_JOBS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
    "PBS_JOBID",
    "LSB_JOBID",
    "FLUX_JOB_ID",
)
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
    if "RANK" in env and "WORLD_SIZE" in env:
        env.setdefault("LOCAL_RANK", env["RANK"])
    elif launcher := _innermost(env):
        _from_launcher(env, launcher)
    elif _in_step(env) and _slurm_tasks(env) > 1 and env.get("SLURM_PROCID"):
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
        _check_rank(env, "RANK", "WORLD_SIZE")


def _innermost(env: Mapping[str, str]) -> _Launcher | None:
    """The launcher that started this very process, where it is not srun and started more than one.

    A launcher starts its daemons by another one, of which its processes inherit the variables: mpirun by srun, in an
    allocation of SLURM. srun and flux in turn set PMI's variables of their own accord, with the same number of ranks.
    """
    found = [one for one in (_OPEN_MPI, _MVAPICH, _FLUX, _HYDRA) if env.get(one.rank) and env.get(one.ranks)]
    found = [one for one in found if _number(env, one.ranks) > 1]
    if _HYDRA in found:
        ranks = _number(env, _HYDRA.ranks)
        if _in_step(env) and ranks == _slurm_tasks(env):
            found.remove(_HYDRA)
        elif _FLUX in found and ranks != _number(env, _FLUX.ranks):
            found.remove(_FLUX)
    return found[0] if found else None


def _in_step(env: Mapping[str, str]) -> bool:
    return any(env.get(name) for name in _STEP)


def _from_launcher(env: MutableMapping[str, str], launcher: _Launcher) -> None:
    _check_rank(env, launcher.rank, launcher.ranks)
    env["RANK"], env["WORLD_SIZE"] = env[launcher.rank], env[launcher.ranks]
    local = [env.get(launcher.local_rank), env.get(_OF_PALS[0]) if launcher is _HYDRA else None]
    env["LOCAL_RANK"] = next(filter(None, local), env[launcher.rank])
    here = env.get(launcher.local_ranks) or (env.get(_OF_PALS[1]) if launcher is _HYDRA else None)
    on_one = env.get("FLUX_JOB_NNODES") == "1" if launcher is _FLUX else here == env["WORLD_SIZE"]
    if "MASTER_ADDR" in env or on_one:
        return
    if launcher is _HYDRA and env.get("SLURM_STEP_NODELIST"):
        # of its daemons, which it starts in the order of its nodes
        env["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
        return
    name = launcher.with_address.split()[0]
    raise ConfigError(
        f"MASTER_ADDR: is not set, and {name} does not tell where the first rank runs; start with "
        f"{launcher.with_address} ..."
    )


def _from_slurm(env: MutableMapping[str, str]) -> None:
    _check_rank(env, "SLURM_PROCID", _slurm_tasks_name(env) or "SLURM_NTASKS")
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(_slurm_tasks(env))
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID") or "0"
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1")


def _alone(env: MutableMapping[str, str], quiet: bool) -> None:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        # one task or rank 0 alone says no more than that it is alone
        if name in env and other not in env and _number(env, name) > (name == "WORLD_SIZE"):
            raise ConfigError(f"{other}: is not set, and {name} is {env[name]}; set both, or neither to run alone")
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
    name = _slurm_tasks_name(env)
    return 1 if name is None else _number(env, name)


def _slurm_tasks_name(env: Mapping[str, str]) -> str | None:
    return next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if env.get(name)), None)


def _check_rank(env: Mapping[str, str], rank: str, ranks: str) -> None:
    """Raises ConfigError in the words of the launcher's own variables."""
    if _number(env, rank) >= _number(env, ranks):
        raise ConfigError(f"{rank} {env[rank]}: must be below {ranks} {env[ranks]}; start through a launcher")


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
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", node_list)
    assert first is not None  # it matches nothing at all, too
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

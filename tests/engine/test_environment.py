"""Launchers' variables, without starting anything."""

from __future__ import annotations

import pytest

from megatron_adamba.engine.environment import complete_environment, first_host, first_rank
from megatron_adamba.errors import ConfigError

BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "node[1-8]"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[3-6]"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def completed(**variables: str) -> tuple[str, str, str, str]:
    env = dict(variables)
    complete_environment(env)
    return env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_ADDR"]


def test_a_batch_script_is_one_process_and_srun_is_many(capsys):
    assert completed(**BATCH) == ("0", "1", "0", "127.0.0.1")
    assert "the allocation has 8 tasks" in capsys.readouterr().err
    assert completed(**STEP) == ("5", "8", "1", "node3")
    assert completed(**STEP | {"SLURM_STEP_NUM_TASKS": "6"}) == ("5", "6", "1", "node3")
    # srun --pty bash in a larger allocation
    assert completed(**STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == ("0", "1", "0", "127.0.0.1")


def test_open_mpi_and_mpich():
    assert completed(**OPEN_MPI) == ("3", "4", "3", "127.0.0.1")
    pmi = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "node1"}
    assert completed(**pmi) == ("1", "2", "0", "node1")
    # mpirun starts its daemons by srun
    assert completed(**STEP | OPEN_MPI) == ("3", "4", "3", "127.0.0.1")
    with pytest.raises(ConfigError, match="mpirun -x MASTER_ADDR"):
        completed(**OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    # srun --mpi=pmi2 sets PMI's variables beside its own
    by_slurm = STEP | {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert completed(**by_slurm) == ("5", "8", "1", "node3")
    assert not first_rank({"RANK": "1"}) and first_rank({"RANK": "0", "WORLD_SIZE": "2"})
    assert not first_rank(OPEN_MPI) and first_rank(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})


@pytest.mark.parametrize("rank", range(8))
def test_hydra_in_an_allocation_starts_its_daemons_by_srun(rank):
    """MPICH's and Intel MPI's: SLURM's variables are the daemon's."""
    daemon = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank // 4), "SLURM_LOCALID": "0"}
    own = {"PMI_RANK": str(rank), "PMI_SIZE": "8", "MPI_LOCALRANKID": str(rank % 4), "MPI_LOCALNRANKS": "4"}
    both = daemon | own | {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}
    assert completed(**both, MASTER_ADDR="node1") == (str(rank), "8", str(rank % 4), "node1")
    assert completed(**both, SLURM_STEP_NODELIST="node[3-4]") == (str(rank), "8", str(rank % 4), "node3")
    assert first_rank(both | {"MASTER_ADDR": "node1"}) == (rank == 0)
    # all on one machine, where there is one daemon
    one = both | {
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "MPI_LOCALNRANKS": "8",
        "MPI_LOCALRANKID": str(rank),
    }
    assert completed(**one) == (str(rank), "8", str(rank), "127.0.0.1")
    with pytest.raises(ConfigError, match="mpiexec -genv MASTER_ADDR"):
        completed(**both)


def test_mvapich():
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    own = {f"MV2_COMM_WORLD_{name}": value for name, value in zip(names, ("5", "8", "1", "4"), strict=True)}
    assert completed(**own, MASTER_ADDR="node1") == ("5", "8", "1", "node1")
    # its daemons, too, may be started by srun
    assert completed(**STEP | {"SLURM_STEP_NUM_TASKS": "2"} | own, MASTER_ADDR="node1") == ("5", "8", "1", "node1")
    with pytest.raises(ConfigError, match=r"mpirun_rsh .* MASTER_ADDR"):
        completed(**own)
    assert completed(**own | {"MV2_COMM_WORLD_LOCAL_SIZE": "8"}) == ("5", "8", "1", "127.0.0.1")


def test_flux():
    own = {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2"}
    assert completed(**own, MASTER_ADDR="node1") == ("5", "8", "1", "node1")
    # it sets PMI's variables as well
    assert completed(**own, PMI_RANK="5", PMI_SIZE="8", MASTER_ADDR="node1") == ("5", "8", "1", "node1")
    assert completed(**own | {"FLUX_JOB_NNODES": "1"}) == ("5", "8", "1", "127.0.0.1")
    with pytest.raises(
        ConfigError, match=r"MASTER_ADDR: .*flux does not tell .*; start with flux run --env=MASTER_ADDR"
    ):
        completed(**own)
    # another launcher within a job of flux
    hydra = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
    for outer in (own, own | {"FLUX_JOB_SIZE": "1", "FLUX_TASK_RANK": "0"}):
        assert completed(**outer | hydra) == completed(**outer | OPEN_MPI) == ("3", "4", "3", "127.0.0.1")
    assert completed(**own, RANK="1", WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="x", OMPI_COMM_WORLD_SIZE="x")[:2] == (
        "1",
        "2",
    )
    with pytest.raises(ConfigError, match="FLUX_JOB_SIZE 'many'"):
        completed(**own | {"FLUX_JOB_SIZE": "many"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_empty_variable_counts_as_none(name):
    assert completed(**{name: ""}) == ("0", "1", "0", "127.0.0.1")
    assert completed(**{name: " "}) == ("0", "1", "0", "127.0.0.1")
    assert completed(**STEP | {name: ""}) == ("5", "8", "1", "node3")
    assert first_rank({name: ""})


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1.5"}, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT 70000"),
        (STEP | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
    ],
)
def test_what_is_no_number_or_cannot_be_is_named(variables, name):
    with pytest.raises(ConfigError, match=name):
        completed(**variables)


def test_jobs_of_one_machine_have_ports_of_their_own():
    ports = set()
    for job in range(40):
        for step in ("0", "1"):
            env = STEP | {"SLURM_JOB_ID": str(1000 + job), "SLURM_STEP_ID": step}
            other = dict(env) | {"SLURM_PROCID": "2"}
            complete_environment(env)
            complete_environment(other)
            assert env["MASTER_PORT"] == other["MASTER_PORT"] and 15000 <= int(env["MASTER_PORT"]) < 29500
            ports.add(env["MASTER_PORT"])
    assert len(ports) > 75
    env = STEP | {"MASTER_PORT": "4711"}
    complete_environment(env)
    assert env["MASTER_PORT"] == "4711"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("rack[1-2]node[03-04]", "rack1node03"), ("node[03-04]-ib", "node03-ib"), ("a,b[1-2]", "a"), ("n[7]", "n7")],
)
def test_first_hosts_of_lists_with_more_than_one_bracket(nodes, first):
    assert first_host(nodes) == first


def test_half_of_a_rank_is_not_run_alone():
    for variables, missing in (
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "RANK"),
    ):
        with pytest.raises(ConfigError, match=f"^{missing}: is not set"):
            completed(**variables)
    assert completed(RANK="0") == completed(WORLD_SIZE="1") == ("0", "1", "0", "127.0.0.1")


def test_crays_launcher_names_local_ranks_in_its_own_way():
    pals = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "MASTER_ADDR": "n1"}
    assert completed(**pals) == ("5", "8", "1", "n1")
    one = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "3", "PMI_LOCAL_SIZE": "4"}
    assert completed(**one) == ("3", "4", "3", "127.0.0.1")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "SLURM_PROCID 'x': must be a number"),
        (
            {"SLURM_PROCID": "9", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
            "SLURM_PROCID 9: must be below SLURM_NTASKS 4",
        ),
        ({"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_RANK 9: must be below OMPI_COMM"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK 8: must be below WORLD_SIZE 8"),
    ],
)
def test_a_launchers_own_variables_are_named(variables, words):
    with pytest.raises(ConfigError) as error:
        complete_environment(dict(variables))
    assert str(error.value).startswith(words)

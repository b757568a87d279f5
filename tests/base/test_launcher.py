"""The variables of torchrun and of Slurm's srun say which process this is."""

import os

import pytest

from openpalm.base.launcher import first_host, launched, local_rank, own_gpu, tasks_by_node
from openpalm.errors import SettingsError

STEP = {  # as srun of Slurm 22.05 sets them, on the second of two nodes
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODELIST": "gpu[01-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
}
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch):
    """Sets the launcher's variables; those that the program itself sets are removed afterwards."""

    def put(given: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name in OURS:
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE \(two\): must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK \(2\): must be below WORLD_SIZE \(2\)"),
    ],
)
def test_a_launcher_s_mistake_is_one_line(variables, given: dict[str, str], said: str):
    variables(given)
    with pytest.raises(SettingsError, match=said):
        launched()


def test_srun_s_variables_become_torchruns(variables):
    variables(STEP)
    assert launched() == (3, 4)
    assert local_rank() == 1
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert os.environ["MASTER_ADDR"] == "gpu07"
    port = int(os.environ["MASTER_PORT"])
    assert 10_000 <= port < 30_000
    variables(STEP | {"SLURM_STEP_ID": "3"})
    launched()
    assert int(os.environ["MASTER_PORT"]) != port


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_STEP_ID": ""},  # a batch script
        {"SLURM_STEP_ID": "4294967290"},  # the shell that salloc opens
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "1"},  # every task is a run of its own
    ],
)
def test_one_process_stays_one(variables, other: dict[str, str]):
    variables(STEP | other)
    assert launched() == (0, 1)
    assert local_rank() == 0


def test_torchrun_inside_a_step_comes_first(variables):
    variables(STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert launched() == (1, 2)
    assert local_rank() == 0


def test_a_rendezvous_that_is_given_is_used(variables):
    variables(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    launched()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "first"),  # as `scontrol show hostnames` answers
    [
        ("vm", "vm"),
        ("a,b", "a"),
        ("node[01-04,07],gpu3", "node01"),
        ("n[7,9]", "n7"),
        ("rack[2-3]n[1-4]", "rack2n1"),
    ],
)
def test_the_first_host(nodes: str, first: str):
    assert first_host(nodes) == first


def test_tasks_by_node():
    assert tasks_by_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_by_node("8") == [8]
    assert tasks_by_node("") == []


def test_each_process_has_its_own_gpu(variables):
    variables({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert own_gpu(2) == 1
    with pytest.raises(SettingsError, match="process 1 of this machine has no GPU: 1 can be used"):
        own_gpu(1)
    variables(STEP)
    assert own_gpu(4) == 1
    assert own_gpu(1) == 0  # srun --gpus-per-task=1 shows it only its own
    # torchrun inside srun: its second process has no GPU.
    variables(STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_LOCALID": "0"})
    with pytest.raises(SettingsError, match="has no GPU"):
        own_gpu(1)

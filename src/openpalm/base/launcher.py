"""Which of a run's processes this one is, by torchrun's variables or by those of Slurm's srun."""

import os
import re

from openpalm.errors import SettingsError

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the ports that systems give to outgoing connections
_LAST_STEP = 0xFFFFFFF0
"""above it are Slurm's special steps: the batch script and salloc's shell"""


def launched() -> tuple[int, int]:
    """Rank and number of processes, one without a launcher. Raises SettingsError."""
    adopt_slurm()
    rank, size = _whole_number("RANK", "0"), _whole_number("WORLD_SIZE", "1")
    if not 0 <= rank < max(size, 1):
        raise SettingsError(f"RANK ({rank}): must be below WORLD_SIZE ({size})")
    return rank, size


def speaks() -> bool:
    """Whether this process prints: the first of several, or the only one.

    A shell may have one variable without the other, left from another program.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return not several or os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Number of this process on its machine."""
    adopt_slurm()
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdecimal() else 0


def own_gpu(visible: int) -> int:
    """Index of this process's GPU among the `visible` ones.

    srun with --gpus-per-task shows each process its own GPU only. Raises SettingsError if this
    process has none.
    """
    rank = local_rank()
    by_srun = _in_step() and os.environ["LOCAL_RANK"] == os.environ["SLURM_LOCALID"]
    if by_srun and visible == 1:
        return 0
    if rank >= visible:
        raise SettingsError(
            f"process {rank} of this machine has no GPU: {visible} can be used; start one process "
            "a GPU (torchrun --nproc-per-node gpu)"
        )
    return rank


def adopt_slurm() -> None:
    """Sets torchrun's variables from Slurm's where srun started this process as one of several.

    Variables that are set stay as they are: `WORLD_SIZE=1` makes every task a run of its own.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ or not _in_step():
        return
    slurm = os.environ
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm["SLURM_NODELIST"]
    number = _whole_number("SLURM_JOB_ID", "0") * 31 + _whole_number("SLURM_STEP_ID", "0")
    tasks = tasks_by_node(slurm.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _whole_number("SLURM_NODEID", "0")
    found = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(nodes),
        # Two steps on one machine must not meet: the port is the step's.
        "MASTER_PORT": str(_FIRST_PORT + number % _PORTS),
    }
    if node < len(tasks):
        found["LOCAL_WORLD_SIZE"] = str(tasks[node])
    os.environ.update(found | {name: slurm[name] for name in found if name in slurm})


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: node07 of `node[07-09,12],other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def tasks_by_node(text: str) -> list[int]:
    """Tasks of each node, from Slurm's short form: 2, 2, 1 of `2(x2),1`."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _in_step() -> bool:
    """Whether srun started this process as one of several; not a batch script, not a shell."""
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")
    if any(not os.environ.get(name, "").isdecimal() for name in names):
        return False
    several = int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1
    return several and int(os.environ["SLURM_STEP_ID"]) < _LAST_STEP


def _whole_number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise SettingsError(f"{name} ({text}): must be a whole number; the launcher sets it")
    return int(text)

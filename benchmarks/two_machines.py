"""Whether a run on two machines ends with a message when one is cut off, and resumes after.

    python benchmarks/two_machines.py [--timeout-s 20] [--steps 60] [--cut-at 10] [--json]

The machines are network namespaces of this one, joined by a virtual cable (Linux, as root). Each
has a torchrun with one process. After step --cut-at the second one's end of the cable is taken
down; both launchers must end by themselves. Then the cable is up again, the same commands are run
again, and the rows and weights must be those of a run that nothing disturbed. Exits 1 if not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kill import Run, prepare, pretraining

NAMES = ("openpalm-a", "openpalm-b")
CABLES = ("veth-palm-a", "veth-palm-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LAUNCHER_S = 60.0
"""How long after the cut a launcher may take to end; then it is killed."""
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Result:
    """What became of the run that was cut in two."""

    cut_after_step: int
    message_after_s: list[float | None]
    """seconds from the cut to the error line, for each machine; None: it said nothing"""
    messages: list[str]
    exit_status: list[int]
    ended_after_s: list[float]
    """seconds from the cut to the end of each launcher"""
    resumed_after_step: int
    equal: bool
    """whether rows and weights are those of an undisturbed run"""

    @property
    def good(self) -> bool:
        reported = [seconds for seconds in self.message_after_s if seconds is not None]
        return self.equal and 0 not in self.exit_status and bool(reported) and min(reported) < 60


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def machines() -> Iterator[None]:
    """Two network namespaces with a cable between them, removed at the end."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ends = [(CABLES[0], NAMES[0]), (CABLES[1], NAMES[1])]
        ip("link", "add", CABLES[0], "netns", NAMES[0], "type", "veth", "peer", CABLES[1])
        ip("link", "set", CABLES[1], "netns", NAMES[1])
        for (cable, name), address in zip(ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
        yield
    finally:
        for name in NAMES:  # a namespace takes its end of the cable with it
            subprocess.run(["ip", "netns", "delete", name], check=False)


class Machine:
    """A torchrun in one of the namespaces, with a host name of its own."""

    def __init__(self, number: int, words: Sequence[str], log: Path, attempt: int):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        launch += ["--nproc-per-node=1", "--rdzv-backend=c10d"]
        launch += [f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--rdzv-id=run-{attempt}"]
        # Else the launcher that is cut off waits a minute each time for the other one.
        launch += ["--rdzv-conf=read_timeout=10"]
        launch += [f"--local-addr={ADDRESSES[number]}", "-m", *words]
        # A host name of its own, so that messages tell the machines apart.
        hosts = log.with_name("hosts")
        known = "".join(f"{a} {name}\n" for a, name in zip(ADDRESSES, NAMES, strict=True))
        hosts.write_text(f"127.0.0.1 localhost\n{known}", encoding="utf-8")
        script = f'hostname {NAMES[number]} && mount --bind {hosts} /etc/hosts && exec "$@"'
        command = ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", *launch]
        self.log = log
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", NAMES[number], *command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLES[number]},
            stdout=subprocess.DEVNULL,
            stderr=log.open("wb"),
        )

    def message(self) -> str | None:
        """The error line of the run, if it has said one."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if "openpalm: error" in line), None)


def start(words: Sequence[str], work: Path, attempt: int) -> list[Machine]:
    return [Machine(n, words, work / f"machine-{n}-{attempt}.log", attempt) for n in range(2)]


def wait(machines: Sequence[Machine]) -> list[int]:
    return [machine.process.wait(PATIENCE_S) for machine in machines]


def prove(options: Sequence[str], work: Path, *, cut_at: int) -> Result:
    whole = Run(work / "whole", "train", options, processes=2)
    whole.finish()
    cut = Run(work / "cut", "train", options)
    words = cut.command[2:]
    with machines():
        running = start(words, work, 1)
        _until(lambda: cut.step() >= cut_at or any(m.process.poll() for m in running))
        if cut.step() < cut_at:
            raise RuntimeError("\n".join(m.log.read_text(errors="replace") for m in running))
        ip("-n", NAMES[1], "link", "set", CABLES[1], "down")
        began, step = time.monotonic(), cut.step()
        said: list[float | None] = [None, None]
        ended: list[float | None] = [None, None]

        def both_ended() -> bool:
            for n, machine in enumerate(running):
                now = round(time.monotonic() - began, 1)
                if said[n] is None and machine.message():
                    said[n] = now
                if ended[n] is None and machine.process.poll() is not None:
                    ended[n] = now
            over = None not in said and time.monotonic() - began > LAUNCHER_S
            return over or None not in ended

        _until(both_ended)
        for machine in running:
            # The launcher that is cut off may wait for its store for minutes; the run has ended.
            if machine.process.poll() is None:
                machine.process.kill()
                machine.process.wait()
        status = [machine.process.returncode for machine in running]
        messages = [machine.message() or "" for machine in running]
        resumed = max(int(p.name[5:]) for p in (cut.out / "checkpoints").glob("step-*"))
        ip("-n", NAMES[1], "link", "set", CABLES[1], "up")
        if any(wait(start(words, work, 2))):
            raise RuntimeError((work / "machine-0-2.log").read_text(errors="replace"))
    weights = "checkpoints/step-*/model.safetensors"
    equal = whole.columns() == cut.columns() and whole.digest(weights) == cut.digest(weights)
    ends = [seconds or 0.0 for seconds in ended]
    return Result(step, said, messages, status, ends, resumed, equal)


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened for {PATIENCE_S:.0f} s")
        time.sleep(0.1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cuts one of two machines off in mid-run.")
    parser.add_argument("--timeout-s", type=float, default=20, help="of the run (default: 20)")
    parser.add_argument("--steps", type=int, default=60, help="of the run (default: 60)")
    parser.add_argument("--cut-at", type=int, default=10, help="step (default: 10)")
    parser.add_argument("--data", type=Path, help="prepared data; not set takes built-in text")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        words = pretraining(options.data or prepare(work))
        words += [f"--steps={options.steps}", "--save-every=5", f"--eval-every={options.steps}"]
        words += ["--dtype=float32", f"--parallel.timeout-s={options.timeout_s}"]
        result = prove(words, work, cut_at=options.cut_at)
    if options.json:
        print(json.dumps(asdict(result) | {"good": result.good}))
    else:
        for name, value in asdict(result).items():
            print(f"{name.replace('_', ' '):<24}{value}")
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Processes of commands: waited for, ended, recognised after their worker was killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from openpalm.feedback.worker import processes
from openpalm.feedback.worker.identity import started
from openpalm.feedback.worker.processes import Command, Running, wait_until_unlocked


@pytest.fixture(autouse=True)
def _python(monkeypatch):
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, "-c"))
    monkeypatch.setattr(processes, "POLL_S", 0.01)


def test_the_exit_status_and_the_last_line(tmp_path):
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    command = Command([code], tmp_path / "logs" / "log")
    assert command.run(check=lambda: None) == 3
    assert sorted((tmp_path / "logs" / "log").read_text().split()) == ["one", "two"]


def test_the_line_of_an_error_is_the_reason(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\ropenpalm: error: no prompt is left\n\nnote: later\n")
    assert Command([], log).last_line() == "openpalm: error: no prompt is left"
    log.write_text("step 1\rstep 2\n\n")
    assert Command([], log).last_line() == "step 2"
    assert Command([], tmp_path / "none").last_line() == ""


def test_it_is_in_a_group_of_its_own_and_known_by_its_start(tmp_path):
    found = []

    def remember(running: Running) -> None:
        found.append((running, running.alive, os.getpgid(running.pid)))

    Command(["import time; time.sleep(0.2)"], tmp_path / "log").run(
        check=lambda: None, remember=remember
    )
    ((running, was_alive, group),) = found
    assert was_alive
    assert group == running.pid
    assert not running.alive
    assert Running.from_json(running.to_json()) == running
    assert Running.from_json(None) is None


def test_an_interruption_ends_the_whole_group_and_waits_for_it(tmp_path):
    """The child's own child too; the child saves before it ends."""
    code = (
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "def end(*_):\n"
        "    print('saved', child.pid, flush=True)\n"
        "    child.wait()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"

    def check() -> None:
        if log.exists() and "ready" in log.read_text():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Command([code], log).run(check=check)
    saved = log.read_text().split()
    assert saved[:2] == ["ready", "saved"]
    assert started(int(saved[2])) is None


def test_a_process_that_does_not_end_is_killed(tmp_path):
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    process = Command([code], log).start()
    while "ready" not in log.read_text():
        time.sleep(0.01)
    processes.end(process, wait_s=0.1)
    assert process.returncode == -signal.SIGKILL


def test_a_left_over_process_is_waited_for(tmp_path):
    log = tmp_path / "log"
    code = "import sys; sys.stdin.readline(); print('first', flush=True)"
    with log.open("wb") as output:
        left = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=output)
    running = Running(left.pid, started(left.pid))
    looks = []

    def check() -> None:
        looks.append(True)
        if len(looks) == 3:
            left.communicate(b"\n")

    Command(["print('second')"], log).run(check=check, left_over=running)
    assert log.read_text().split() == ["first", "second"]
    assert len(looks) >= 3


def test_a_number_that_was_given_again_is_another_process(tmp_path):
    stranger = Running(os.getpid(), "an earlier start")
    assert not stranger.alive
    assert Command(["pass"], tmp_path / "log").run(check=lambda: None, left_over=stranger) == 0


def test_a_locked_directory_is_waited_for(tmp_path):
    code = (
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    looks = []

    def check() -> None:
        looks.append(True)
        if len(looks) == 3:
            holder.communicate(b"\n")

    wait_until_unlocked(tmp_path, check)
    assert len(looks) >= 3
    holder.stdout.close()
    wait_until_unlocked(tmp_path / "none", check)


def test_a_process_that_dies_with_the_worker(tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux has it")
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from openpalm.feedback.worker import processes\n"
        "processes.PROGRAM = (sys.executable, '-c')\n"
        "words = ['import time; time.sleep(600)']\n"
        "command = processes.Command(words, Path(sys.argv[1]), dies_with_us=True)\n"
        "print(command.start().pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    child = int(worker.stdout.readline())
    assert started(child) is not None
    worker.kill()
    worker.communicate()
    while started(child) is not None:
        time.sleep(0.01)

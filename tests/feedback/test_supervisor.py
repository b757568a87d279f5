"""The supervisor of several processes, with small Python programs as children."""

import os
import signal
import sys
import threading
import time

import pytest

from openpalm.errors import WorkError
from openpalm.feedback import supervisor
from openpalm.feedback.supervisor import Child, Supervisor
from openpalm.feedback.worker.identity import started


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)


def child(name: str, code: str, tmp_path) -> Child:
    """It is ready when it has written its number to a file of its name."""
    file = tmp_path / name
    before = f"import os, signal, sys, time\nopen({str(file)!r}, 'a').write(f'{{os.getpid()}} ')\n"
    return Child(name, lambda: [sys.executable, "-c", before + code], ready=file.exists)


def pids(name: str, tmp_path) -> list[int]:
    return [int(word) for word in (tmp_path / name).read_text().split()]


def wait_until(holds) -> None:
    while not holds():
        time.sleep(0.01)


def run_until(supervised: Supervisor, act) -> list[str]:
    """Runs it in the main thread, as signals need; `act` in another, then Ctrl-C."""
    said: list[str] = []

    def other() -> None:
        wait_until(lambda: "ready" in said)
        act()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=other)
    thread.start()
    supervised.run(lambda: said.append("ready"))
    thread.join()
    return said


def test_children_start_in_order_and_end_together(tmp_path):
    second = "print(os.path.exists(sys.argv[0]))\ntime.sleep(600)"
    children = [child("a", "time.sleep(600)", tmp_path), child("b", second, tmp_path)]
    children[1].command = lambda: [
        sys.executable,
        "-c",
        f"import os, time\nassert os.path.exists({str(tmp_path / 'a')!r})\n"
        f"open({str(tmp_path / 'b')!r}, 'a').write(str(os.getpid()))\ntime.sleep(600)",
    ]
    lines: list[str] = []
    run_until(Supervisor(children, say=lines.append), lambda: None)
    assert lines == []
    for name in "ab":
        (pid,) = pids(name, tmp_path)
        assert started(pid) is None


def test_a_crashed_child_starts_again_and_a_line_says_so(tmp_path):
    lines: list[str] = []

    def crash() -> None:
        os.kill(pids("a", tmp_path)[0], signal.SIGKILL)
        wait_until(lambda: len(pids("a", tmp_path)) == 2)

    run_until(Supervisor([child("a", "time.sleep(600)", tmp_path)], say=lines.append), crash)
    assert lines == ["the a was ended by SIGKILL; it starts again in 0.01 s"]


def test_the_pause_doubles(tmp_path):
    lines: list[str] = []
    flag = tmp_path / "flag"
    code = f"while not os.path.exists({str(flag)!r}): time.sleep(0.01)\nsys.exit(3)"

    def crash() -> None:
        flag.touch()
        wait_until(lambda: len(lines) >= 3)

    run_until(Supervisor([child("a", code, tmp_path)], say=lines.append), crash)
    assert [line.rpartition("in ")[2] for line in lines[:3]] == ["0.01 s", "0.02 s", "0.04 s"]
    assert lines[0].startswith("the a ended with status 3")


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (1, 1), (7, 1)])
def test_a_child_that_is_never_ready_ends_the_command(tmp_path, status, expected):
    good = child("good", "time.sleep(600)", tmp_path)
    bad = Child("bad", lambda: [sys.executable, "-c", f"exit({status})"], ready=lambda: False)
    with pytest.raises(WorkError, match="the bad ended before it was ready") as caught:
        Supervisor([good, bad], say=print).run(lambda: None)
    assert caught.value.exit_status == expected
    assert started(pids("good", tmp_path)[0]) is None


def test_children_have_time_to_finish(tmp_path):
    code = (
        "def end(*_):\n"
        "    time.sleep(0.2)\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').write('yes')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path / 'listens')!r}, 'w').close()\n"
        "time.sleep(600)"
    )
    one = child("a", code, tmp_path)
    one.ready = (tmp_path / "listens").exists
    run_until(Supervisor([one], say=print), lambda: None)
    assert (tmp_path / "saved").read_text() == "yes"


def test_the_ready_line_of_a_child_is_dropped_and_its_errors_are_not(tmp_path, capfd):
    code = "print('I am ready', flush=True)\nprint('wrong', file=sys.stderr, flush=True)\n"
    one = child(
        "a", code + f"open({str(tmp_path / 'said')!r}, 'w').close()\ntime.sleep(600)", tmp_path
    )
    one.ready = (tmp_path / "said").exists
    one.hides_output = True
    run_until(Supervisor([one], say=print), lambda: None)
    out, err = capfd.readouterr()
    assert "I am ready" not in out + err
    assert "wrong" in err

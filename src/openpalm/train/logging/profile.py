"""Profiler: a trace of a few training steps, and the operators that take most time.

RUN/profile/trace.json.gz    every operator and kernel on a time line: open it in Perfetto
RUN/profile/operators.txt    operators sorted by their own time
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from openpalm.train.config import TrainSettings

WARM_UP_STEPS = 3
"""Untraced steps first: they allocate memory, compile, choose kernels."""
_SHOWN = 15


class Profiler:
    """Traces --profile.steps training steps of this process."""

    def __init__(self, settings: TrainSettings, device: torch.device, say: Callable[[str], None]):
        self._steps = self._left = settings.profile.steps or 0
        self._wait = WARM_UP_STEPS
        self._out = settings.out / "profile"
        self._device = device
        self._say = say
        self._trace: profile | None = None

    def before_step(self) -> None:
        if self._left and not self._wait and self._trace is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines of its own in the terminal
            cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._trace = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._trace.start()

    def after_step(self) -> None:
        if self._trace is None:
            self._wait = max(0, self._wait - 1)
            return
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
        """Writes the trace; says so if the run was too short for one."""
        if self._trace is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._trace.stop()
            self._write(self._trace, self._steps - self._left)
            self._trace, self._left = None, 0
        elif self._left:
            self._say(f"--profile.steps: no step was left after {WARM_UP_STEPS} to warm up")
            self._left = 0

    def _write(self, trace: profile, steps: int) -> None:
        self._out.mkdir(exist_ok=True)
        file = self._out / "trace.json.gz"
        trace.export_chrome_trace(str(file))
        table = operators(trace.key_averages(), steps, self._device.type)
        (self._out / "operators.txt").write_text(table + "\n", encoding="utf-8")
        self._say(f"{table}\nprofile: {file}; open it at https://ui.perfetto.dev")


def operators(events: Any, steps: int, device: str) -> str:
    """A table of the operators that take most time of their own, and the sum of all."""

    def own_us(event: Any) -> float:
        return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total

    # On a GPU both the launch and the kernel carry its time; count kernels only.
    kernels = [e for e in events if device != "cuda" or e.device_type.name == "CUDA"]
    total = sum(map(own_us, kernels)) or 1.0
    lines = [f"{'share':>6} {'ms a step':>10} {'calls a step':>13}  operator"]
    for event in sorted(kernels, key=own_us, reverse=True)[:_SHOWN]:
        time = own_us(event)
        lines.append(
            f"{time / total:6.1%} {time / 1000 / steps:10.3f} {event.count / steps:13.1f}  "
            f"{event.key[:60]}"
        )
    lines.append(f"{1:6.0%} {total / 1000 / steps:10.3f} {'':13}  all, over {steps} steps")
    return "\n".join(lines)

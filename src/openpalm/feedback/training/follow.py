"""What a running training reports in its directory: step, figures, the curve, alarms."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpalm.base import jsonl
from openpalm.base.json_file import read_json
from openpalm.errors import OpenPalmError

MAX_POINTS = 300
READ_EVERY_S = 1.0
SHOWN = (
    *("loss", "accuracy", "reward_margin", "reward", "kl", "length", "entropy", "tokens_per_s"),
    *("val_loss", "val_accuracy", "val_agreement", "val_calibration_error", "val_reward_margin"),
    *("val_reward", "val_gold", "val_kl", "val_length", "val_distinct", "elapsed_s"),
)
KL_LIMIT, LENGTH_FACTOR, DISTINCT_SHARE = 25.0, 2.0, 0.5
"""nats per completion; growth of the completions; what is left of the different completions"""


class RunFollower:
    """Reads the run's files again when they have changed."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        self._seen: tuple[int, int] | None = None
        self._looked_at = 0.0

    def changed(self, *, now: bool = False) -> bool:
        """Whether there are other rows than before; looks at most once a second, or `now`."""
        if not now and time.monotonic() - self._looked_at < READ_EVERY_S:
            return False
        self._looked_at = time.monotonic()
        path = self.directory / "metrics.jsonl"
        try:
            stat = path.stat()
        except OSError:
            return False
        if (stat.st_mtime_ns, stat.st_size) == self._seen:
            return False
        self._seen = stat.st_mtime_ns, stat.st_size
        self.rows = [row for row in jsonl.read_rows(path) if isinstance(row.get("step"), int)]
        return bool(self.rows)

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def steps(self) -> int:
        """Steps of the whole run; 0 until it is known."""
        try:
            return int(read_json(self.directory / "run.json", "")["steps"])
        except (OpenPalmError, OSError, KeyError, TypeError, ValueError):
            return 0

    @property
    def figures(self) -> dict[str, Any]:
        """The last value of each figure."""
        found: dict[str, Any] = {}
        for row in self.rows:
            found |= {name: row[name] for name in SHOWN if row.get(name) is not None}
        return found

    @property
    def curve(self) -> list[list[float]]:
        """[[step, loss], ...], thinned; the reward where rewards are what is learned from."""
        column = "reward" if any("reward" in row for row in self.rows) else "loss"
        points = [[row["step"], row[column]] for row in self.rows if row.get(column) is not None]
        every = -(-len(points) // MAX_POINTS) or 1
        kept = points[::every]
        return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def alarms_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Signs that the policy exploits its reward (Gao et al. 2023), in words for the page."""
    measured = [row for row in rows if row.get("val_reward") is not None]
    if len(measured) < 2:
        return []
    first, last = measured[0], measured[-1]
    if last["val_reward"] <= first["val_reward"]:
        return []
    rise = f"the reward rose from {first['val_reward']:.3g} to {last['val_reward']:.3g} while "
    found = []
    if _both(first, last, "val_gold") and last["val_gold"] < first["val_gold"]:
        found.append(
            f"{rise}the reward that is not trained on fell from {first['val_gold']:.3g} to "
            f"{last['val_gold']:.3g}: the reward is being gamed"
        )
    if _both(first, last, "val_length") and (
        last["val_length"] > LENGTH_FACTOR * max(1.0, first["val_length"])
    ):
        found.append(
            f"{rise}answers grew from {first['val_length']:.0f} to {last['val_length']:.0f} "
            "tokens: the reward may pay for length"
        )
    if _both(first, last, "val_distinct") and (
        last["val_distinct"] < DISTINCT_SHARE * first["val_distinct"]
    ):
        found.append(
            f"{rise}the share of different answers fell from {first['val_distinct']:.0%} to "
            f"{last['val_distinct']:.0%}: answers become all alike"
        )
    if (last.get("val_kl") or 0) > KL_LIMIT:
        found.append(f"{rise}the policy moved {last['val_kl']:.0f} nats from its parent")
    return found


def _both(first: dict[str, Any], last: dict[str, Any], name: str) -> bool:
    return first.get(name) is not None and last.get(name) is not None

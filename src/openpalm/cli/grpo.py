"""`openpalm grpo`: reinforcement learning of a checkpoint with GRPO, Dr. GRPO, DAPO or RLOO."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpalm.align.config import GrpoSettings
from openpalm.base.settings import parse

if TYPE_CHECKING:
    from openpalm.train.run import Outcome


def run(argv: Sequence[str]) -> None:
    settings = parse(
        GrpoSettings,
        argv,
        verb="grpo",
        about="Reinforcement learning with GRPO, Dr. GRPO, DAPO or RLOO: samples several "
        "completions of each prompt from a checkpoint, and trains it to prefer those with a higher "
        'reward than the others. --data is a .jsonl with one prompt per row, {"prompt": ...}, and '
        "any other fields that the reward reads.",
        examples=[
            "openpalm grpo --init runs/chat --data p.jsonl --out runs/g --steps 9 --reward exact",
            "openpalm grpo --init runs/chat --data p.jsonl --out runs/h --steps 9 --reward a.py:f",
        ],
    )
    from openpalm.cli.train import report

    report(learn(settings), settings)


def learn(settings: GrpoSettings, label: str = "grpo") -> "Outcome":
    """Composes the run: a policy without a critic, in the loop over rollouts."""
    from openpalm.align.rollouts.grpo import GroupObjective, estimate
    from openpalm.cli.rl_common import train_on_rollouts

    return train_on_rollouts(settings, GroupObjective(settings), estimate, label)

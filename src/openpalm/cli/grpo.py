"""`openpalm grpo`: a fine-tuned checkpoint, prompts and a reward in; no critic, groups instead."""

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
        about="Trains a checkpoint on groups of its own answers, each measured against the others "
        "to the same prompt: GRPO, Dr. GRPO, DAPO, RLOO. The data is a .jsonl of prompts: "
        '{"prompt": ...} with whatever the reward needs beside.',
        examples=[
            "openpalm grpo --init runs/chat --data p.jsonl --out runs/g --steps 9 --reward exact",
            "openpalm grpo --init runs/chat --data p.jsonl --out runs/h --steps 9 --reward a.py:f",
        ],
    )
    from openpalm.cli.train import report

    report(learn(settings), settings)


def learn(settings: GrpoSettings, label: str = "grpo") -> "Outcome":
    """Composes the run: a policy, THE loop over rollouts in groups."""
    from openpalm.align.rollouts.grpo import GroupObjective, estimate
    from openpalm.cli.rl_common import train_on_rollouts

    return train_on_rollouts(settings, GroupObjective(settings), estimate, label)

"""`openpalm ppo`: a checkpoint, prompts and a reward in; a policy that earns more of it out."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from openpalm.align.config import PpoSettings
from openpalm.base.settings import parse

if TYPE_CHECKING:
    from openpalm.model.transformer import Transformer
    from openpalm.train.run import Outcome


def run(argv: Sequence[str]) -> None:
    settings = parse(
        PpoSettings,
        argv,
        verb="ppo",
        about="Trains a checkpoint on its own answers to prompts by a reward, with a critic. "
        'The data is a .jsonl of prompts: {"prompt": ...} with whatever the reward needs beside.',
        examples=[
            "openpalm ppo --init runs/chat --data p.jsonl --out runs/p --steps 9 --reward runs/rm",
            "openpalm ppo --init runs/chat --data p.jsonl --out runs/q --steps 9 --reward a.py:f",
        ],
    )
    from openpalm.cli.train import report

    report(learn(settings), settings)


def learn(settings: PpoSettings, label: str = "ppo") -> "Outcome":
    """Composes the run: a policy with its critic, THE loop over rollouts."""
    from openpalm.align.rollouts.ppo import PpoObjective, estimate
    from openpalm.cli.rl_common import train_on_rollouts
    from openpalm.model.critic import ActorCritic, Bins

    reach, count = settings.value_range, settings.value_bins
    bins = Bins(count, -reach, reach) if count else None

    def prepare(model: "Transformer") -> None:
        assert isinstance(model, ActorCritic)
        model.reset_critic()

    return train_on_rollouts(
        settings,
        PpoObjective(settings),
        estimate,
        label,
        make_model=partial(ActorCritic, kind=settings.critic, bins=bins),
        prepare=prepare,
    )

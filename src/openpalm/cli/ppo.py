"""`openpalm ppo`: reinforcement learning of a checkpoint with PPO, a reward and a critic."""

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
        about="Reinforcement learning with PPO: samples completions of prompts from a checkpoint, "
        "scores them with a reward, and trains the policy and a critic on them. --data is a .jsonl "
        'with one prompt per row, {"prompt": ...}, and any other fields that the reward reads.',
        examples=[
            "openpalm ppo --init runs/chat --data p.jsonl --out runs/p --steps 9 --reward runs/rm",
            "openpalm ppo --init runs/chat --data p.jsonl --out runs/q --steps 9 --reward a.py:f",
        ],
    )
    from openpalm.cli.train import report

    report(learn(settings), settings)


def learn(settings: PpoSettings, label: str = "ppo") -> "Outcome":
    """Composes the run: a policy with a critic, in the loop over rollouts."""
    from openpalm.align.rollouts.ppo import PpoObjective, estimate
    from openpalm.cli.rl_common import train_on_rollouts
    from openpalm.model.critic import ActorCritic, Bins

    limit, count = settings.value_range, settings.value_bins
    bins = Bins(count, -limit, limit) if count else None

    def reset_critic(model: "Transformer") -> None:
        assert isinstance(model, ActorCritic)
        model.reset_critic()  # the checkpoint has no weights for it

    return train_on_rollouts(
        settings,
        PpoObjective(settings),
        estimate,
        label,
        make_model=partial(ActorCritic, kind=settings.critic, bins=bins),
        prepare=reset_critic,
    )

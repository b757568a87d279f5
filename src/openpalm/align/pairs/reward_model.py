"""Training reward models: the Bradley-Terry margin loss on pairs, and losses on ratings.

A reward model gives a completion one number r. Bradley and Terry's model of preferences says that
of a chosen completion w and a rejected completion l to one prompt, P(w is preferred) =
s(r_w - r_l), with s the sigmoid. Its negative log-likelihood is the loss on pairs:

    bradley-terry  -log s(r_w - r_l - m) + c (r_w + r_l)^2
                   m: margin, larger where the judges were surer        Llama 2, 2023, eq. 2
                   c: centring; differences alone leave the mean free   Eisenstein et al. 2023

Losses on a rating y of a single completion:

    regression     (r - y)^2
    binned         cross entropy; the class is the bin nearest to y     palm-rlhf-pytorch
    hl-gauss       cross entropy with a Gaussian around y, integrated over the bins, normalised
                                                             Imani & White 2018; Farebrother 2024
    ordinal        sum over k of the binary cross entropy of [y > v_k], logits f(x) + b_k
                                                             McCullagh 1980; Cao et al. 2020

The reward of a binned head is the expectation over its bins. In an ensemble every member learns
from the same examples, from its own first weights; the loss is the mean over members.

A departure from most implementations: the model reads the completion to its last token, the end
marker, and never beyond. A reward model that stops before the end marker cannot see the difference
between a finished and a truncated completion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openpalm.align.config import RewardLoss, RewardSettings
from openpalm.align.pairs.examples import PreferenceExample, in_batch_order, labels
from openpalm.errors import DataError, SettingsError
from openpalm.model.config import MAX_BINS, RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import Transformer
from openpalm.train.initial_weights import Start
from openpalm.train.objective import Metrics

DEFAULT_BINS = 21
SIGMA = 0.75
"""HL-Gauss: standard deviation in bin widths, as Farebrother et al. 2024 recommend."""
_KINDS: dict[RewardLoss, Literal["scalar", "binned", "ordinal"]] = {
    "bradley-terry": "scalar",
    "regression": "scalar",
    "binned": "binned",
    "hl-gauss": "binned",
    "ordinal": "ordinal",
}


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """Whole conversations, the end marker included, with the labels of their completions.

    ids: int64 [rows, time]; mask: bool [rows, time], True for real tokens; prompt_lengths: [rows].
    labels: float32, margins [rows / 2] of pairs, whose chosen half comes first, or ratings [rows].
    """

    ids: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "ScoreBatch":
        tensors = (self.ids, self.mask, self.prompt_lengths, self.labels)
        return ScoreBatch(*(tensor.to(device) for tensor in tensors))


def collate(examples: Sequence[PreferenceExample]) -> ScoreBatch:
    """One row for each completion, padded on the right."""
    rows = in_batch_order(examples)
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.ids) for row in rows])
    prompts = torch.tensor([row.loss_mask.index(True) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ScoreBatch(ids, mask, prompts, labels(examples))


def choose_head(
    settings: RewardSettings, ratings: Sequence[float], given: RewardConfig | None = None
) -> RewardConfig:
    """The head that the loss trains: `given`, the head of --init, or a new one.

    ratings: all ratings of the data, empty for pairs. Raises SettingsError where the loss does not
    fit the given head, DataError where all ratings are equal or one is no value of a bin.
    """
    kind = _KINDS[settings.loss]
    if given is None:
        values = _bin_values(settings, ratings) if kind != "scalar" else ()
        options = {
            "read": settings.pooling,
            "marks": settings.segment_embeddings,
            "members": settings.ensemble_size,
        }
        given = RewardConfig(kind, values, bias=settings.loss == "regression", **options)
    elif given.kind != kind:
        raise SettingsError(
            f"--loss {settings.loss}: trains {kind} heads, but --init has a {given.kind} head; "
            "choose a loss for that head, or begin from a language model"
        )
    if len({*ratings}) == 1:
        raise DataError(
            f"all {len(ratings)} ratings are {ratings[0]:g}, so there is nothing to learn; give "
            "ratings that differ"
        )
    between = settings.loss == "hl-gauss"
    odd = [r for r in ratings if given.values and not _has_bin(r, given.values, between)]
    if odd:
        low, high = given.values[0], given.values[-1]
        raise DataError(
            f"rating {odd[0]:g} is none of the {len(given.values)} values from {low:g} to "
            f"{high:g}; set --bins, or use --loss hl-gauss or regression"
        )
    return given


def _bin_values(settings: RewardSettings, ratings: Sequence[float]) -> tuple[float, ...]:
    """--bins values from the lowest rating to the highest, by default the whole numbers."""
    lowest, highest = min(ratings), max(ratings)
    bins = settings.bins
    if bins is None and settings.loss == "hl-gauss" and not all(r.is_integer() for r in ratings):
        bins = DEFAULT_BINS
    if bins is None:
        lowest, highest = math.floor(lowest), math.ceil(highest)
        bins = max(2, highest - lowest + 1)
    if bins > MAX_BINS:
        raise DataError(f"ratings from {lowest:g} to {highest:g} give {bins} bins; set --bins")
    step = (highest - lowest) / (bins - 1) or 1.0
    return tuple(lowest + step * k for k in range(bins))


def _has_bin(rating: float, values: Sequence[float], between: bool) -> bool:
    """Whether the rating is a bin's value, or with `between` anywhere within the range."""
    slack = 1e-6 * (values[-1] - values[0])
    if between:
        return values[0] - slack <= rating <= values[-1] + slack
    return min(abs(rating - value) for value in values) <= slack


def load_first_weights(
    model: Transformer, settings: RewardSettings, start: Start, ratings: Sequence[float]
) -> None:
    """Fills the model from --init: a whole reward model, or a language model under new heads.

    A new regression head begins at the mean rating: steps would take long to move it there.
    """
    assert isinstance(model, RewardModel)
    start.fill(model)
    if start.reward is None:
        initialise_heads(model, settings.seed, sum(ratings) / max(1, len(ratings)))


class RewardObjective:
    """Sums one of these losses over pairs or rated completions; the model is a RewardModel."""

    def __init__(self, settings: RewardSettings):
        self.settings = settings

    def count(self, batch: ScoreBatch, /) -> int:
        """Pairs, or rated completions."""
        return len(batch.labels)

    def loss(self, model: Transformer, batch: ScoreBatch, /) -> tuple[Tensor, Metrics]:
        assert isinstance(model, RewardModel)
        scores = model.member_scores(batch.ids, batch.mask, batch.prompt_lengths)
        rewards = model.expected(scores)
        if self.settings.reads_pairs:
            chosen, rejected = rewards.chunk(2, dim=-1)
            margins = self.settings.margin_scale * batch.labels
            losses = bradley_terry(chosen, rejected, margins, self.settings.centring_coef)
        else:
            values = scores.new_tensor(model.reward.values)
            losses = rating_losses(self.settings.loss, scores, batch.labels, values)
        return losses.mean(dim=0).sum(), self._metrics(rewards.detach(), batch.labels)

    def _metrics(self, members: Tensor, labels: Tensor) -> Metrics:
        """Sums over pairs or completions, of the members' mean; members: [members, rows]."""
        rewards = members.mean(dim=0)
        deviation = members.std(dim=0, correction=0).sum().item()
        # Metrics are divided by the count of labels; a pair has two rows and one label.
        spread = {"spread": deviation * len(labels) / len(rewards)} if len(members) > 1 else {}
        if not self.settings.reads_pairs:
            return {"squared_error": (rewards - labels).square().sum().item()} | spread
        chosen, rejected = rewards.chunk(2)
        return {
            "accuracy": (chosen > rejected).float().sum().item(),
            "reward_margin": (chosen - rejected).sum().item(),
            "reward_chosen": chosen.sum().item(),
            "reward_rejected": rejected.sum().item(),
        } | spread


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor, centring: float = 0.0
) -> Tensor:
    """Losses of pairs, from their two rewards and the wanted margins; shapes broadcast."""
    return -F.logsigmoid(chosen - rejected - margins) + centring * (chosen + rejected).square()


def rating_losses(loss: RewardLoss, scores: Tensor, ratings: Tensor, values: Tensor) -> Tensor:
    """Losses [..., rows] of scores [..., rows, outputs] against ratings [rows].

    values: bin values, rising; `binned` and `ordinal` round each rating to the nearest one.
    """
    if loss == "regression":
        return (scores[..., 0] - ratings).square()
    if loss == "hl-gauss":
        return -(gaussian_bins(ratings, values) * scores.log_softmax(dim=-1)).sum(dim=-1)
    bins = (ratings[:, None] - values).abs().argmin(dim=-1)
    if loss == "ordinal":
        steps = torch.arange(scores.shape[-1], device=bins.device)
        above = (bins[:, None] > steps).to(scores.dtype).expand_as(scores)
        return F.binary_cross_entropy_with_logits(scores, above, reduction="none").sum(dim=-1)
    picked = F.one_hot(bins, len(values)).to(scores.dtype)
    return -(picked * scores.log_softmax(dim=-1)).sum(dim=-1)


def gaussian_bins(ratings: Tensor, values: Tensor) -> Tensor:
    """Probabilities [..., bins] of evenly spaced bins under a Gaussian around each rating [...]."""
    width = (values[-1] - values[0]) / (len(values) - 1)
    edges = torch.cat([values - width / 2, values[-1:] + width / 2])
    below = torch.special.ndtr((edges - ratings[..., None]) / (SIGMA * width))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

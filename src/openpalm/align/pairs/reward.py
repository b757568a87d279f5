"""Reward models: learning from judgements what a judge would say of an answer.

From pairs, a prompt x with a chosen answer w and a rejected one l, Bradley and Terry's model says
P(w is preferred) = s(r_w - r_l), s the logistic function, r the reward model's number:

    bradley-terry  -log s(r_w - r_l - m) + c (r_w + r_l)^2
                   m: a margin, larger where the judges were surer      Llama 2, 2023, eq. 2
                   c: a pull to mean zero, as only differences are told Eisenstein et al. 2023

From ratings y of single answers:

    regression     (r - y)^2
    binned         cross entropy of the bin that y is        palm-rlhf-pytorch
    hl-gauss       cross entropy with a Gaussian around y, cut into the bins and normalised
                                                             Imani & White 2018; Farebrother 2024
    ordinal        sum over k of the binary cross entropy of [y > v_k], logits f(x) + b_k
                                                             McCullagh 1980; Cao et al. 2020

Bins are read as their expectation. Every member of an ensemble learns from the same judgements,
from heads that begin apart, and the loss is the mean over members. A departure from most
implementations: the answer is read to its last token, the end marker, and never beyond.
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
from openpalm.align.pairs.pairs import Judged, answer_record, fitted
from openpalm.data.rows.preferences import Rating, Usable
from openpalm.data.text.conversation import Example
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, SettingsError
from openpalm.model.config import MAX_BINS, RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import Transformer
from openpalm.train.initial_weights import Start
from openpalm.train.objective import Metrics

DEFAULT_BINS = 21
_KINDS: dict[RewardLoss, Literal["scalar", "binned", "ordinal"]] = {
    "bradley-terry": "scalar",
    "regression": "scalar",
    "binned": "binned",
    "hl-gauss": "binned",
    "ordinal": "ordinal",
}
SIGMA = 0.75
"""Deviation of the Gaussian in widths of a bin, as Farebrother et al. 2024 recommend."""


@dataclass(frozen=True, slots=True)
class RatingRecord:
    """An answer as a record whose loss mask is on it alone."""

    answer: Example
    label: float
    """the rating"""

    @property
    def sides(self) -> tuple[Example, ...]:
        return (self.answer,)


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """Whole answers, the end marker included, and what was said of them.

    ids: int64 [rows, time]; mask: bool [rows, time], True where real; prompt_lengths: [rows].
    labels: float32, the margins of pairs [rows / 2], whose chosen half comes first, or ratings
    [rows].
    """

    ids: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "ScoreBatch":
        parts = (self.ids, self.mask, self.prompt_lengths, self.labels)
        return ScoreBatch(*(part.to(device) for part in parts))


def collate(judged: Sequence[Judged]) -> ScoreBatch:
    """The judged answers' rows, of pairs the chosen ones' before the rejected ones'."""
    rows = [
        record for side in zip(*(each.sides for each in judged), strict=True) for record in side
    ]
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.ids) for row in rows])
    prompts = torch.tensor([row.loss_mask.index(True) for row in rows])
    labels = torch.tensor([each.label for each in judged], dtype=torch.float32)
    return ScoreBatch(ids, torch.arange(ids.shape[1]) < lengths[:, None], prompts, labels)


def rating_records(
    tokenizer: Tokenizer, ratings: Usable[Rating], longest: int
) -> Usable[RatingRecord]:
    """The ratings whose answers fit `longest` tokens, and why the others are left out."""

    def made(rating: Rating) -> RatingRecord | str:
        answer = fitted(answer_record(tokenizer, rating.prompt, rating.answer), longest)
        return answer if isinstance(answer, str) else RatingRecord(answer, float(rating.value))

    return ratings.then(made)


def head_for(
    settings: RewardSettings, ratings: Sequence[float], known: RewardConfig | None = None
) -> RewardConfig:
    """The head that the loss needs: the one that --init brings, or a new one.

    ratings: all of the data's, empty for pairs. Raises SettingsError where the loss does not suit
    a known head, DataError where the ratings say nothing or are none of the bins' values.
    """
    kind = _KINDS[settings.loss]
    if known is None:
        values = _values(settings, ratings) if kind != "scalar" else ()
        shared = {"read": settings.read, "marks": settings.marks, "members": settings.members}
        known = RewardConfig(kind, values, bias=settings.loss == "regression", **shared)
    elif known.kind != kind:
        raise SettingsError(
            f"--loss {settings.loss}: learns {kind} heads, those of --init are {known.kind}"
        )
    if len({*ratings}) == 1:
        raise DataError(f"all {len(ratings)} ratings are {ratings[0]:g}; there is nothing to learn")
    between = settings.loss == "hl-gauss"
    odd = [r for r in ratings if known.values and not _is_value(r, known.values, between)]
    if odd:
        low, high = known.values[0], known.values[-1]
        raise DataError(
            f"rating {odd[0]:g} is none of the {len(known.values)} values from {low:g} to "
            f"{high:g}; set --bins, or take --loss hl-gauss or regression"
        )
    return known


def _values(settings: RewardSettings, ratings: Sequence[float]) -> tuple[float, ...]:
    """From the lowest rating to the highest: so many, or whole numbers where nothing is said."""
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


def _is_value(rating: float, values: Sequence[float], between: bool) -> bool:
    slack = 1e-6 * (values[-1] - values[0])
    if between:
        return values[0] - slack <= rating <= values[-1] + slack
    return min(abs(rating - value) for value in values) <= slack


def fill(
    model: Transformer, settings: RewardSettings, start: Start, ratings: Sequence[float]
) -> None:
    """First weights: all of a reward model's, or a language model's below new heads."""
    assert isinstance(model, RewardModel)
    if start.reward is not None:
        start.fill(model)
        return
    trunk = Transformer(model.config).to(model.embedding.device)
    start.fill(trunk)
    model.load_state_dict(trunk.state_dict(), strict=False)
    initialise_heads(model, settings.seed, sum(ratings) / max(1, len(ratings)))


class RewardObjective:
    """Sums one of these losses over pairs or ratings; the model must be a RewardModel."""

    def __init__(self, settings: RewardSettings):
        self.settings = settings

    def count(self, batch: ScoreBatch, /) -> int:
        """Pairs, or rated answers."""
        return len(batch.labels)

    def loss(self, model: Transformer, batch: ScoreBatch, /) -> tuple[Tensor, Metrics]:
        assert isinstance(model, RewardModel)
        scores = model.member_scores(batch.ids, batch.mask, batch.prompt_lengths)
        rewards = model.expected(scores)
        if self.settings.reads_pairs:
            chosen, rejected = rewards.chunk(2, dim=-1)
            margins = self.settings.margin_scale * batch.labels
            losses = bradley_terry(chosen, rejected, margins, self.settings.centring)
        else:
            values = scores.new_tensor(model.reward.values)
            losses = rating_losses(self.settings.loss, scores, batch.labels, values)
        return losses.mean(dim=0).sum(), self._metrics(rewards.detach(), batch.labels)

    def _metrics(self, members: Tensor, labels: Tensor) -> Metrics:
        """Sums over pairs or answers, of the members' mean; members: [members, rows]."""
        rewards = members.mean(dim=0)
        spread = members.std(dim=0, correction=0).sum().item()
        doubt = {"spread": spread * len(labels) / len(rewards)} if len(members) > 1 else {}
        if not self.settings.reads_pairs:
            return {"squared_error": (rewards - labels).square().sum().item()} | doubt
        chosen, rejected = rewards.chunk(2)
        return {
            "accuracy": (chosen > rejected).float().sum().item(),
            "reward_margin": (chosen - rejected).sum().item(),
            "reward_chosen": chosen.sum().item(),
            "reward_rejected": rejected.sum().item(),
        } | doubt


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor, centring: float = 0.0
) -> Tensor:
    """Losses of pairs by their two rewards and the margins asked for; shapes broadcast."""
    return -F.logsigmoid(chosen - rejected - margins) + centring * (chosen + rejected).square()


def rating_losses(loss: RewardLoss, scores: Tensor, ratings: Tensor, values: Tensor) -> Tensor:
    """Losses [..., rows] of scores [..., rows, outputs] by the ratings [rows].

    values: of the bins, rising; `binned` and `ordinal` take each rating as the nearest one.
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
    """The chances [..., bins] that a Gaussian around each rating [...] gives evenly spaced bins."""
    width = (values[-1] - values[0]) / (len(values) - 1)
    edges = torch.cat([values - width / 2, values[-1:] + width / 2])
    below = torch.special.ndtr((edges - ratings[..., None]) / (SIGMA * width))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

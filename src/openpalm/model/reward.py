"""Reward model: a transformer with heads that score a whole text; scalar, binned or ordinal.

A head reads one state after the final norm: of the last token (Stiennon et al. 2020), or the mean
over all tokens (palm-rlhf-pytorch). It returns a number, a distribution over bins, or the
cumulative log-odds of an ordinal scale. The losses are in align/pairs.
"""

import torch
from torch import Tensor, nn

from openpalm.errors import DataError
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.sharding import assign, local_part, local_part_or_none
from openpalm.model.transformer import Transformer


class RewardModel(Transformer):
    """Adds the parameters `reward_head`, `reward_bias` and `marks` to those of a Transformer."""

    def __init__(self, config: ModelConfig, reward: RewardConfig):
        super().__init__(config)
        self.reward = reward
        self.reward_head = nn.Parameter(torch.empty(reward.members * reward.directions, config.dim))
        biased = reward.bias or reward.kind != "scalar"
        size = reward.members * reward.outputs
        self.reward_bias = nn.Parameter(torch.empty(size)) if biased else None
        self.marks = nn.Parameter(torch.empty(2, config.dim)) if reward.marks else None

    def score(
        self, ids: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Mean output of the heads: float32 [rows], or [rows, outputs] unless scalar.

        ids: int64 [rows, time].
        mask: bool [rows, time], False at padding, which must be on the right; None: no padding.
        prompt_lengths: int [rows], for models with marks: the ids before it get the prompt mark,
        the others the completion mark. None adds no marks.
        Raises DataError for a row of padding only.
        """
        scores = self.member_scores(ids, mask, prompt_lengths).mean(dim=0)
        return scores[:, 0] if self.reward.kind == "scalar" else scores

    def value(
        self, ids: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """The reward, float32 [rows]: the mean over the members. Arguments as for `score`."""
        return self.expected(self.member_scores(ids, mask, prompt_lengths)).mean(dim=0)

    def spread(
        self, ids: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Standard deviation of the members' rewards, float32 [rows]; 0 for one member."""
        members = self.expected(self.member_scores(ids, mask, prompt_lengths))
        return members.std(dim=0, correction=0)

    def member_scores(
        self, ids: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Output of each head, float32 [members, rows, outputs]. Arguments as for `score`."""
        marks = None if self.marks is None else _marked(local_part(self.marks), ids, prompt_lengths)
        states = self.norm(self.residual(ids, added=marks))
        read = _last if self.reward.read == "last" else _mean
        head = local_part(self.reward_head).view(self.reward.members, -1, self.config.dim)
        # Always float32: rewards are compared with each other, and bfloat16 has three digits.
        with torch.autocast(ids.device.type, enabled=False):
            scores = torch.einsum("rd,mod->mro", read(states, mask).float(), head.float())
            bias = local_part_or_none(self.reward_bias)
            if bias is None:
                return scores
            return scores + bias.float().view(self.reward.members, 1, -1)

    def expected(self, scores: Tensor) -> Tensor:
        """The reward [...] of scores [..., outputs]: the expectation over the bins, if any."""
        if self.reward.kind == "scalar":
            return scores[..., 0]
        values = scores.new_tensor(self.reward.values)
        if self.reward.kind == "binned":
            return scores.softmax(dim=-1) @ values
        return values[0] + scores.sigmoid() @ values.diff()  # E[y] = sum of P(y > k) steps


def make_model(config: ModelConfig, reward: RewardConfig | None) -> Transformer:
    """An uninitialised Transformer, or a RewardModel if `reward` is given."""
    return Transformer(config) if reward is None else RewardModel(config, reward)


@torch.no_grad()
def initialise_heads(model: RewardModel, seed: int, offset: float = 0.0) -> None:
    """Initialises the reward heads and marks; rewards of a scalar head scatter around `offset`.

    Heads are normal with variance 1 / (dim + 1) (Stiennon et al. 2020, appendix B.1), drawn apart
    for each member. An ordinal head starts with equal probabilities of all values. Marks are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = model.reward_head.shape
    drawn = torch.randn(shape, generator=generator) * (model.config.dim + 1) ** -0.5
    assign(model.reward_head, drawn)
    if model.marks is not None:
        model.marks.zero_()
    if model.reward_bias is not None:
        bias = torch.full((model.reward.outputs,), offset)
        if model.reward.kind == "binned":
            bias.zero_()
        elif model.reward.kind == "ordinal":
            below = torch.arange(1, len(bias) + 1) / (len(bias) + 1)
            bias = -below.logit()
        assign(model.reward_bias, bias.repeat(model.reward.members))


def _marked(marks: Tensor, ids: Tensor, prompt_lengths: Tensor | None) -> Tensor | None:
    """The prompt or completion mark of each token, [rows, time, dim]."""
    if prompt_lengths is None:
        return None
    in_completion = torch.arange(ids.shape[1], device=ids.device) >= prompt_lengths[:, None]
    return marks[in_completion.long()]


def _last(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return states[:, -1]
    _check_not_padding(mask)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).amax(dim=-1)
    return states[torch.arange(len(states), device=mask.device), last]


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return states.float().mean(dim=1)
    _check_not_padding(mask)
    return (states.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=-1, keepdim=True)


def _check_not_padding(mask: Tensor) -> None:
    if not mask.any(dim=-1).all():
        raise DataError("mask: a row has no real token to read; leave that row out")

"""A group's completions in one row with their prompt: loss and gradient as in rows of their own."""

import pytest
import torch
from tiny_models import tiny

from openpalm.align.config import GrpoSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.grpo import GroupObjective
from openpalm.align.rollouts.rollout_batch import Completion, RolloutBatch, collate_completions
from openpalm.data.batches.loader import IGNORE

SETTINGS = GrpoSettings(
    data="-",
    out="-",
    init="-",
    steps=1,
    num_completions=3,
    epochs_per_rollout=2,
    kl="k3",
    max_new_tokens=12,
)


def ragged() -> RolloutBatch:
    """Three completions to each of two prompts, with columns that differ at every token."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> list[int]:
        return torch.randint(0, 265, (size,), generator=generator).tolist()

    completions = []
    for prompt in (draw(20), draw(25)):
        completions += [Completion(0, prompt, draw(size), [], True) for size in (3, 12, 7)]
    inputs, targets = collate_completions(completions)
    mask = targets != IGNORE
    columns = [torch.randn(mask.shape, generator=generator) * mask for _ in range(6)]
    with torch.no_grad():  # near what the model thinks, so that no ratio vanishes
        near = evaluate(tiny(), inputs, targets).log_probs
    old, reference = (near + 0.1 * column for column in columns[:2])
    return RolloutBatch(inputs, targets, old, reference, *columns[2:])


def check_same(batch: RolloutBatch, other: RolloutBatch) -> None:
    model, objective, found = tiny(), GroupObjective(SETTINGS), []
    for each in (batch, other):
        model.zero_grad()
        loss, _ = objective.loss(model, each)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4 * float(found[0][1].abs().max()))


def test_sharing_a_row_changes_nothing():
    batch = ragged()
    shared = batch.with_shared_prompts(3)
    assert shared.segments is not None
    assert shared.inputs.numel() < 0.9 * batch.inputs.numel()
    assert GroupObjective(SETTINGS).count(shared) == 6
    check_same(batch, shared)


def test_columns_of_other_answers_would_be_seen():
    batch = ragged()
    order = torch.arange(6).view(3, 2).T.flatten()  # prompt and number exchanged
    wrong = batch.with_shared_prompts(3)
    wrong = RolloutBatch(**wrong.columns | {"advantages": wrong.advantages[order]})
    with pytest.raises(AssertionError):
        check_same(batch, wrong)

"""Completions in a shared row have the log-probabilities and gradients of separate rows."""

import pytest
import torch
from small_models import SHAPES, make

from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs import shared_prompt as shared_module
from openpalm.align.pairs.examples import PreferenceExample, collate, collate_shared
from openpalm.align.pairs.shared_prompt import SharedRows, common_prompt, row_length, share
from openpalm.data.batches.loader import padded
from openpalm.data.text.conversation import Example
from openpalm.model.layout import Layout, packed_layout, shared_prompt_layout
from openpalm.model.lora import LoraConfig, attach

DECODERS = {name: config for name, config in SHAPES.items() if config.causal}
LENGTHS = [(5, (4, 2, 7)), (1, (1, 6, 3)), (9, (2, 2, 5))]
"""Lengths of prompts and of their completions."""


def draw(generator, size):
    return torch.randint(50, (size,), generator=generator).tolist()


@pytest.fixture(scope="module")
def groups():
    """Completions of different lengths; one has tokens without a loss in the middle."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for prompt, answers in LENGTHS:
        before = draw(generator, prompt)
        sides = [
            Example([*before, i, *draw(generator, n - 1)], [False] * prompt + [True] * n)
            for i, n in enumerate(answers)
        ]
        made.append(sides)
    made[0][2].loss_mask[7:10] = [False] * 3
    return made


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def outcome(model, log_probs):
    """The sum of each example, and the gradient of a weighted sum."""
    model.zero_grad()
    found = log_probs()
    weights = torch.linspace(-1, 1, len(found))
    (found.sum(-1) * weights).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found.detach().sum(-1), gradients


def check_one_row_is_one_each(model, groups, lay_out, share_rows):
    def together():
        rows = share_rows(groups)
        return token_log_probs(model, rows.inputs, rows.targets, lay_out(rows.segments), rows.reads)

    def alone():
        rows = [group[number] for number in range(3) for group in groups]
        return token_log_probs(model, *padded(rows, 64))

    (found, gradients), (expected, exact) = outcome(model, together), outcome(model, alone)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert len(gradients) == len(exact) > 0
    for a, b in zip(gradients, exact, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max().item())


@pytest.mark.parametrize("name", DECODERS)
def test_one_row_is_one_each(name, groups):
    model = make(DECODERS[name]).requires_grad_()
    check_one_row_is_one_each(model, groups, shared_prompt_layout, share)


def test_one_row_is_one_each_under_an_adapter(groups):
    model = make(SHAPES["grouped"])
    attach(model, LoraConfig(rank=2, alpha=4, targets=("q", "k", "v", "out", "gate", "down")), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter += 0.1
    check_one_row_is_one_each(model, groups, shared_prompt_layout, share)


def test_the_bugs_are_noticed(groups):
    model = make(SHAPES["multi-query"]).requires_grad_()

    def sees_the_other_answers(segments):
        causal = packed_layout(torch.zeros_like(segments)).attend
        return Layout(shared_prompt_layout(segments).positions, causal)

    def positions_go_on(segments):
        here = torch.arange(segments.shape[1]).expand_as(segments)
        return Layout(here, shared_prompt_layout(segments).attend)

    def positions_restart(segments):
        right = shared_prompt_layout(segments).positions
        prompts = (segments == 0).sum(1, keepdim=True)
        return Layout(right - prompts * (segments > 0), shared_prompt_layout(segments).attend)

    def first_token_from_the_place_before(groups):
        """For a second completion that is the end of the first one, not of the prompt."""
        rows = share(groups)
        reads = rows.reads.clone()
        reads[3:, 0] = reads[3:, 1] - 1
        return SharedRows(rows.inputs, rows.segments, rows.targets, reads)

    for lay_out in (sees_the_other_answers, positions_go_on, positions_restart):
        fails(check_one_row_is_one_each, model, groups, lay_out, share)
    fails(
        check_one_row_is_one_each,
        model,
        groups,
        shared_prompt_layout,
        first_token_from_the_place_before,
    )


def test_bfloat16_in_blocks(groups, monkeypatch):
    """The bfloat16 kernel of CPUs, with blocks shorter than the row."""
    monkeypatch.setattr("openpalm.model.attention.BLOCK", 4)
    model, rows = make(SHAPES["grouped"]), share(groups)
    how = (model, rows.inputs, rows.targets, shared_prompt_layout(rows.segments), rows.reads)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_log_probs(*how)
        alone = token_log_probs(model, *padded([g[i] for i in range(3) for g in groups], 64))
    exact = token_log_probs(*how)
    rounding = (alone.sum(-1) - exact.sum(-1)).abs().max()
    assert 0 < rounding < 0.5
    assert (found.sum(-1) - exact.sum(-1)).abs().max() < 2 * rounding


def test_where_the_prompt_ends():
    def record(ids, counts):
        return Example(list(ids), [c == "1" for c in counts])

    assert common_prompt([record([1, 2, 3], "001"), record([1, 2, 4], "001")]) == 2
    both_begin_alike = [record([1, 2, 3], "011"), record([1, 2, 4], "011")]
    assert common_prompt(both_begin_alike) == 1, "what counts is computed for each"
    assert common_prompt([record([1, 2], "01"), record([3, 2], "01")]) == 0
    assert row_length(both_begin_alike) == 3


def test_pairs_share_only_where_that_is_less_work(groups, monkeypatch):
    def pair(prompt, answer):
        loss_mask = [False] * prompt + [True] * answer
        sides = (Example([7] * prompt + [side] * answer, loss_mask) for side in (1, 2))
        return PreferenceExample(tuple(sides))

    assert collate_shared([pair(64, 64)] * 2).inputs.shape == (2, 192)
    assert collate_shared([pair(8, 64)] * 2).inputs.shape[0] == 4
    assert collate_shared([pair(8, 64)] * 2).segments is None
    strangers = PreferenceExample((groups[0][0], groups[1][0]))
    assert collate_shared([pair(64, 64), strangers]).inputs.shape[0] == 4
    batch = collate_shared([pair(64, 64)])
    assert len(batch) == 1 == len(collate([pair(64, 64)]))
    monkeypatch.setattr(shared_module, "WORTH_SHARING", 2)
    assert collate_shared([pair(8, 64)] * 2).segments is not None


@pytest.mark.parametrize("name", ["multi-query", "gpt-j", "raw-head"])
def test_wanted_places_are_those_of_the_whole(name):
    model = make(SHAPES[name])
    ids = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))
    places = torch.tensor([32, 0, 5, 5, 17])
    whole = model.residual(ids).flatten(0, 1)[places]
    assert torch.allclose(model.residual(ids, selected=places), whole, atol=1e-5)

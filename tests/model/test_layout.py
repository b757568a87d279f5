"""Packed sequences are each computed as alone; the checks themselves are shown to fail on bugs."""

import pytest
import torch
from small_models import SHAPES, ids_for, make

from openpalm.model import layout as layouts
from openpalm.model.layout import Layout, packed_layout

DECODERS = {name: config for name, config in SHAPES.items() if config.causal}
LENGTHS = [[1, 7, 2, 10], [20], [3, 3, 5, 1, 1, 7]]
SEGMENTS = torch.stack(
    [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
)
PLACES = [
    (row, sum(lengths[:i]), sum(lengths[: i + 1]))
    for row, lengths in enumerate(LENGTHS)
    for i in range(len(lengths))
]


def check_packed_is_alone(model, ids, lay_out, tolerance=1e-5):
    """Logits, and the gradient of a loss over them, against one sequence at a time."""
    weigh = torch.randn(*ids.shape, model.config.vocab_size, generator=torch.manual_seed(3))

    def gradients(logits_of):
        model.zero_grad()
        logits = logits_of()
        logits = [part.log_softmax(-1) for part in logits]
        sum(
            (part * weigh[row, start:end]).sum()
            for part, (row, start, end) in zip(logits, PLACES, strict=True)
        ).backward()
        return torch.cat(logits).detach(), [
            p.grad.clone() for p in model.parameters() if p.grad is not None
        ]

    def alone():
        return [model.logits(ids[row : row + 1, start:end])[0] for row, start, end in PLACES]

    def together():
        logits = model.logits(ids, layout=lay_out(SEGMENTS))
        return [logits[row, start:end] for row, start, end in PLACES]

    for found, expected in zip(gradients(together), gradients(alone), strict=True):
        for a, b in zip([*found], [*expected], strict=True):
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item())


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_is_each_alone(name):
    model = make(DECODERS[name]).requires_grad_()
    check_packed_is_alone(model, ids_for(DECODERS[name], rows=3), packed_layout)


def test_cross_talk_and_positions_that_go_on_are_noticed():
    model = make(SHAPES["xpos"]).requires_grad_()
    ids = ids_for(SHAPES["xpos"], rows=3)

    def cross_talk(segments):
        return Layout(
            packed_layout(segments).positions, packed_layout(torch.zeros_like(segments)).attend
        )

    def off_by_one(segments):
        return Layout(
            packed_layout(segments).positions, packed_layout(segments.roll(1, dims=1)).attend
        )

    fails(check_packed_is_alone, model, ids, cross_talk)
    fails(check_packed_is_alone, model, ids, off_by_one)
    check_positions_restart(packed_layout)
    going_on = torch.arange(20).expand(3, -1)
    fails(check_positions_restart, lambda s: Layout(going_on, packed_layout(s).attend))


def check_positions_restart(lay_out):
    """Rotations see only differences, so logits alone would not notice positions that go on."""
    expected = [[p for length in row for p in range(length)] for row in LENGTHS]
    assert lay_out(SEGMENTS).positions.tolist() == expected


def test_a_changed_neighbour_changes_no_bit():
    model, ids = make(SHAPES["multi-query"]), ids_for(SHAPES["multi-query"], rows=3)
    changed = ids.clone()
    changed[0, :8] = (changed[0, :8] + 1) % 50
    before, after = (model.logits(i, layout=packed_layout(SEGMENTS))[0, 8:] for i in (ids, changed))
    assert torch.equal(before, after)


def test_bfloat16_in_blocks(monkeypatch):
    """The kernel of bfloat16 on a CPU, with sequences longer than its block."""
    monkeypatch.setattr("openpalm.model.attention.BLOCK", 4)
    model = make(SHAPES["grouped"])
    ids = ids_for(SHAPES["grouped"], rows=3)
    with torch.autocast("cpu", torch.bfloat16):
        together = model.logits(ids, layout=packed_layout(SEGMENTS))
        alone = [model.logits(ids[row : row + 1, s:e])[0] for row, s, e in PLACES]
    exact = model.logits(ids, layout=packed_layout(SEGMENTS))
    together = torch.cat([together[row, s:e] for row, s, e in PLACES])
    exact = torch.cat([exact[row, s:e] for row, s, e in PLACES])
    rounding = (torch.cat(alone) - exact).abs().max()
    assert 0 < rounding < 0.2
    assert (together - exact).abs().max() < 2 * rounding


def test_numbers_need_not_be_in_order():
    numbers = torch.tensor([[5, 5, -1, 5], [0, 0, 0, 0]])
    assert packed_layout(numbers).positions.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]


def test_like_lengths_are_attended_together(monkeypatch):
    """The cost: as many calls as there are doublings of length, none longer than its sequences."""
    seen = []
    real = layouts.causal_attention
    monkeypatch.setattr(
        layouts, "causal_attention", lambda q, k, v: seen.append(q.shape[:2]) or real(q, k, v)
    )
    lay_out = packed_layout(SEGMENTS)
    lay_out.attend(0, *torch.zeros(3, 3, 20, 1, 4).unbind())
    assert [tuple(shape) for shape in seen] == [(3, 1), (3, 3), (3, 7), (1, 10), (1, 20)]


def test_not_for_caches_or_encoders():
    model = make(SHAPES["encoder"])
    with pytest.raises(AssertionError, match="causal"):
        model.logits(ids_for(SHAPES["encoder"], rows=3), layout=packed_layout(SEGMENTS))

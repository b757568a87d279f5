"""benchmarks/experiments.py: its intervals, its positions, and what the document says."""

import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.tiny_models import tiny

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import experiments

DOCUMENT = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")


def row(variant, lr, seed, loss):
    return {"variant": variant, "lr": lr, "seed": seed, "val_loss": loss}


def study():
    """Muon is lower by 0.3, 0.4 and 0.5 on seeds whose own spread is far greater."""
    rows = [
        row("AdamW", lr, 0, loss) for lr, loss in zip(experiments.RATES, (5, 4, 6), strict=True)
    ]
    muon = zip(experiments.MUON_RATES, (3.5, 3.7, 3.6), strict=True)
    rows += [row("Muon", lr, 0, loss) for lr, loss in muon]
    rows += [row("Muon", 4e-2 * 4, 0, 1.0)]  # of the stability runs, not of the search
    for seed, (base, gain) in enumerate([(4.0, 0.3), (5.0, 0.4), (6.0, 0.5)], 1):
        rows += [row("AdamW", experiments.RATES[1], seed, base)]
        rows += [row("Muon", experiments.MUON_RATES[0], seed, base - gain)]
        rows += [row("Muon", experiments.MUON_RATES[1], seed, 9.0)]
    return rows


def check_compare(compare):
    found = compare(study(), "Muon")
    assert found.rate == experiments.MUON_RATES[0]
    assert found.loss == pytest.approx(4.6)
    assert found.difference == pytest.approx(-0.4)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-4)
    assert found.verdict == "lower"


def test_a_difference_is_paired_by_seed_at_each_ones_best_rate():
    check_compare(experiments.compare)


def test_differences_of_other_seeds_are_noticed():
    def crossed(rows, name):
        other = {1: 3, 3: 1}
        swapped = [
            r | {"seed": other.get(r["seed"], r["seed"])} if r["variant"] == "AdamW" else r
            for r in rows
        ]
        return experiments.compare(swapped, name)

    with pytest.raises(AssertionError):
        check_compare(crossed)


def test_a_rate_chosen_among_the_stability_runs_is_noticed(monkeypatch):
    def careless(rows, name):
        return min((r for r in rows if r["variant"] == name), key=lambda r: r["val_loss"])["lr"]

    monkeypatch.setattr(experiments, "best_rate", careless)
    with pytest.raises((AssertionError, KeyError, statistics.StatisticsError)):
        check_compare(experiments.compare)


@pytest.mark.parametrize(
    ("seeds", "share"),
    [(2, lambda t: math.atan(t) / math.pi), (3, lambda t: t / 2 / math.sqrt(2 + t * t))],
)
def test_the_quantiles_leave_a_fortieth_above(seeds, share):
    # Student's distribution in closed form for one and two degrees of freedom.
    assert 0.5 + share(experiments.T_95[seeds]) == pytest.approx(0.975, abs=1e-5)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(-0.11, "lower"), (-0.09, "no difference seen"), (0.1, "no difference seen"), (0.2, "higher")],
)
def test_an_interval_over_zero_is_no_difference(difference, verdict):
    assert experiments.Compared(1.0, 4.0, difference, 0.1).verdict == verdict


def check_ranges(by_range):
    model, tokens = tiny(), torch.arange(100) * 7 % 265
    whole = [
        F.cross_entropy(
            model.logits(tokens[None, a : a + 32])[0], tokens[a + 1 : a + 33], reduction="none"
        )
        for a in (0, 16, 32, 48, 64)
    ]
    losses = torch.stack(whole).mean(0)
    wanted = [losses[:4].mean(), losses[4:8].mean(), losses[8:].mean()]
    assert by_range(model, tokens) == pytest.approx([float(w) for w in wanted], abs=1e-4)


@torch.no_grad()
def test_a_range_has_the_losses_at_its_positions(monkeypatch):
    monkeypatch.setattr(experiments, "EDGES", (0, 4, 8, 32))
    check_ranges(experiments.by_range)
    with pytest.raises(AssertionError):
        check_ranges(lambda model, tokens: experiments.by_range(model, tokens)[::-1])


def test_the_tables_of_the_document_are_those_of_the_logs():
    rows = experiments.read("variants.jsonl")
    assert experiments.variants_table(rows) in DOCUMENT
    assert experiments.search_table(rows) in DOCUMENT
    assert experiments.extrapolation_tables(experiments.read("extrapolation.jsonl")) in DOCUMENT


def test_the_logs_are_small_and_whole():
    files = sorted(experiments.LOGS.iterdir())
    assert [file.name for file in files] == ["extrapolation.jsonl", "variants.jsonl"]
    assert sum(file.stat().st_size for file in files) < 300_000
    runs = [experiments.key(row) for row in experiments.read("variants.jsonl")]
    assert len(set(runs)) == len(runs)
    assert not any(re.search(r"/(tmp|home|work|root)/", file.read_text()) for file in files)

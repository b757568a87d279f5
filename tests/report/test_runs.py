"""Run directories are read back: rows, settings, sizes, groups."""

import json

import pytest
from report_pages import make_run, row

from openpalm.checkpoint import directory as checkpoint
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise
from openpalm.report.runs import (
    differences,
    group_by_kind,
    group_by_seed,
    mean_of_last,
    read_runs,
    smooth,
)

CONFIG = ModelConfig(vocab_size=80, dim=16, depth=2, heads=2, head_dim=8, ff_dim=32, context=16)


def save_checkpoint(run):
    model = Transformer(CONFIG)
    initialise(model, 0)
    checkpoint.save(run / "checkpoints" / checkpoint.step_name(20), model)


def test_the_smoothed_curve_is_a_mean():
    assert smooth([3.0] * 40) == pytest.approx([3.0] * 40)
    smoothed = smooth([0.0, 1.0] * 200)
    assert smoothed[-1] == pytest.approx(0.5, abs=0.1)


def test_every_axis_places_every_value(tmp_path):
    config = "model: m\nsequence_length: 8\n"
    run = make_run(tmp_path / "mine", config=config)
    save_checkpoint(run)
    (read,) = read_runs([run])
    flops = CONFIG.flops_per_token(8)
    assert flops != CONFIG.flops_per_token()
    places = {"steps": [10, 20], "tokens": [10_000, 20_000], "minutes": [5.0, 10.0]}
    places["flops"] = [10_000 * flops, 20_000 * flops]
    for axis, x in places.items():
        assert read.curve("val_loss", axis) == (x, [7.77 / 10, 7.77 / 20])
        assert len(read.curve("loss", axis)[0]) == 20
    assert read.parameters == CONFIG.parameters


@pytest.mark.parametrize("why", ["no checkpoint", "steps cost other FLOPs", "a torn checkpoint"])
def test_flops_that_are_not_known_are_not_drawn(tmp_path, why):
    other = [row(i, mfu=None) for i in range(1, 21)]
    run = make_run(tmp_path / "mine", rows=other if why == "steps cost other FLOPs" else None)
    if why != "no checkpoint":
        save_checkpoint(run)
    if why == "a torn checkpoint":
        (run / "checkpoints/step-00000020/config.json").write_text("{", encoding="utf-8")
    (read,) = read_runs([run])
    assert read.curve("loss", "flops") == ([], [])
    assert len(read.curve("loss", "tokens")[0]) == 20


def test_lost_losses_leave_a_gap(tmp_path):
    lost = [row(2, loss=None, skipped="loss not finite"), row(3, loss=float("nan"))]
    (read,) = read_runs([make_run(tmp_path / "mine", [row(1), *lost, row(4)])])
    assert read.curve("loss", "steps") == ([1, 4], [6.0, 1.5])
    assert mean_of_last(read) == 1.5


@pytest.mark.parametrize("loss", ['"low"', "true", "[1]", "{}", "1e999"])
def test_rows_from_elsewhere_are_not_believed(tmp_path, loss):
    run = make_run(tmp_path / "mine", [row(1), row(3)])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row(4)).replace("1.5", loss) + "\n")
        file.write(json.dumps(row(5, tokens="many")) + "\n")
        file.write(json.dumps(row(6, elapsed_s=None)) + "\n")
    (read,) = read_runs([run])
    assert read.curve("loss", "minutes") == ([0.5, 1.5], [6.0, 2.0])


def test_names_are_as_short_as_they_can_be(tmp_path):
    paths = [make_run(tmp_path / name) for name in ("a/run", "b/run", "b/other")]
    runs = read_runs([*paths, tmp_path / "a" / ".." / "a" / "run"])
    assert [run.name for run in runs] == ["a/run", "b/run", "other"]


def test_the_directory_one_stands_in_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path / "mine"))
    (read,) = read_runs([type(tmp_path)()])
    assert read.name == "mine"


def pairs(i):
    return {"step": i, "loss": 0.7, "pairs": 8 * i, "elapsed_s": 2.0 * i, "pairs_per_s": 4.0}


def test_losses_of_another_meaning_are_apart(tmp_path):
    dpo = [pairs(i) for i in range(1, 4)]
    runs = read_runs(
        [
            make_run(tmp_path / "train"),
            make_run(tmp_path / "dpo", dpo, config="loss: dpo\n"),
            make_run(tmp_path / "ipo", dpo, config="loss: ipo\n"),
            make_run(tmp_path / "again", dpo, config="loss: dpo\nbeta: 0.2\n"),
            make_run(tmp_path / "sft", config="template: chat\n"),
        ]
    )
    names = [[run.name for run in kind] for kind in group_by_kind(runs)]
    assert names == [["train"], ["dpo", "again"], ["ipo"], ["sft"]]


def test_seeds_are_grouped_and_repeats_are_not(tmp_path):
    configs = {"a": (0, 1), "b": (1, 1), "c": (0, 2), "d": (0, 3), "e": (0, 3)}
    runs = [
        make_run(
            tmp_path / name,
            config=f"seed: {seed}\nlr: {lr}\nout: {name}\nchosen: {{peak_flops: {seed + 7}}}\n",
        )
        for name, (seed, lr) in configs.items()
    ]
    groups = [[run.name for run in group] for group in group_by_seed(read_runs(runs))]
    assert groups == [["a", "b"], ["c"], ["d"], ["e"]]


def test_only_settings_that_differ_are_told(tmp_path):
    first = "out: a\nsteps: 5\noptim: {lr: 0.1, beta1: 0.9}\nchosen: {peak_flops: 1.0}\n"
    second = "out: b\nsteps: 5\noptim: {beta1: 0.8}\nchosen: {peak_flops: 2.0}\nseed: 3\n"
    runs = [make_run(tmp_path / "a", config=first), make_run(tmp_path / "b", config=second)]
    assert differences(read_runs(runs)) == [
        ("optim.lr", ["0.1", "not set"]),
        ("optim.beta1", ["0.9", "0.8"]),
        ("seed", ["not set", "3"]),
    ]


def test_what_a_run_measured_is_read_from_run_json_and_from_older_settings(tmp_path):
    new = make_run(tmp_path / "new", config="seed: 1\n")
    (new / "run.json").write_text('{"steps": 50, "dtype": "float32"}', encoding="utf-8")
    old = make_run(tmp_path / "old", config="seed: 1\nchosen: {steps: 50, dtype: float32}\n")
    runs = read_runs([new, old])
    assert [run.planned for run in runs] == [50, 50]
    assert runs[0].settings == runs[1].settings
    assert runs[0].settings["run.dtype"] == "float32"

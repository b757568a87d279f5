"""Adapters and --last-layers from the command line: train, resume, merge, use, refuse."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from command_line import rows, talk, write_base

from openpalm.checkpoint import directory as checkpoint
from openpalm.model import lora
from openpalm.train.spec import LORA_RATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_base(folder / "base", context=96, clear=True)
    turns = [[("user", f"Question {i}?"), ("assistant", f"Yes, {i}.")] for i in range(60)]
    talk(folder / "talk.jsonl", *turns)
    pairs = [{"prompt": f"Q {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return folder


def words(folder, out, *more, verb="sft", init="base"):
    data = folder / ("pairs.jsonl" if verb == "dpo" else "talk.jsonl")
    steps = () if "--steps" in more else ("--steps", 6)
    return (
        *(verb, "--init", folder / init, "--data", data, "--out", out, *steps),
        *("--batch-tokens", 384, "--save-every", 3, "--dtype", "float32", *more),
    )


@pytest.fixture(scope="module")
def adapted(folder):
    """A finished run with an adapter."""
    from openpalm.cli.main import main

    given = words(folder, folder / "adapted", "--lora.rank", 4)
    assert main([str(word) for word in given]) == 0
    return folder / "adapted"


def tensors(path):
    return safetensors.torch.load_file(checkpoint.resolve(path) / "model.safetensors")


def check_base_kept(folder, run):
    base, trained = tensors(folder / "base"), tensors(run)
    for name, tensor in base.items():
        assert torch.equal(trained[name], tensor), name
    moved = [name for name in trained if name.endswith(".b") and trained[name].any()]
    assert len(moved) == 2 * 7


def test_only_the_adapter_learns(folder, adapted, said, tmp_path):
    check_base_kept(folder, adapted)
    logged = [row for row in rows(adapted / "metrics.jsonl") if "loss" in row]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert said(*words(folder, tmp_path / "all"))[0] == 0
    with pytest.raises((AssertionError, KeyError)):
        check_base_kept(folder, tmp_path / "all")
    ordinary = [row for row in rows(tmp_path / "all" / "metrics.jsonl") if "loss" in row]
    assert logged[0]["loss"] == ordinary[0]["loss"]  # attaching changed nothing
    assert logged[0]["lr"] == pytest.approx(LORA_RATE * ordinary[0]["lr"])


def test_a_run_that_stopped_goes_on_exactly(folder, adapted, said, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(adapted, out)
    shutil.rmtree(out / "checkpoints" / checkpoint.step_name(6))
    status, _, errors = said(*words(folder, out, "--lora.rank", 4))
    assert status == 0, errors
    whole, resumed = tensors(adapted), tensors(out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    status, _, errors = said(*words(folder, out, "--lora.rank", 2))
    assert status == 2
    assert "another --lora (rank 4, now 2)" in errors[-1]


def test_last_layers_are_all_that_moves(folder, said, tmp_path):
    assert said(*words(folder, tmp_path / "out", "--last-layers", 1))[0] == 0
    base, trained = tensors(folder / "base"), tensors(tmp_path / "out")
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert moved == {name for name in base if name.startswith(("blocks.1.", "norm."))}


def test_dpo_with_an_adapter_begins_at_its_reference(folder, adapted, said, tmp_path):
    given = words(folder, tmp_path / "out", "--lora.rank", 2, verb="dpo", init="adapted")
    status, _, errors = said(*given)
    assert status == 0, errors
    steps = [row for row in rows(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    parent, model = checkpoint.load(adapted), checkpoint.load(tmp_path / "out")
    ids = torch.arange(40)[None]
    with lora.detached(model):
        assert (model.logits(ids) - parent.logits(ids)).abs().max() < 1e-4
    assert (model.logits(ids) - parent.logits(ids)).abs().max() > 1e-3


def sampled(said, *given):
    status, output, errors = said(
        *("sample", *given, "Question 7?", "--temperature", 0, "--dtype", "float32", "--json"),
        *("--max-new-tokens", 12),
    )
    assert status == 0, errors
    return json.loads(output)["tokens"]


def test_merged_given_and_attached_answer_alike(folder, adapted, said, tmp_path):
    expected = sampled(said, adapted)
    assert expected != sampled(said, folder / "base")
    assert sampled(said, folder / "base", "--adapter", adapted) == expected
    own = checkpoint.resolve(adapted) / "adapter"
    assert sampled(said, folder / "base", "--adapter", own) == expected
    for number, given in enumerate([(adapted,), (folder / "base", "--adapter", own)]):
        out = tmp_path / f"merged{number}"
        status, output, errors = said("merge-lora", *given, "--out", out)
        assert status == 0, errors
        assert "logits within" in output
        assert tensors(out).keys() == tensors(folder / "base").keys()
        assert sampled(said, out) == expected


def test_an_adapter_on_another_base_is_refused_unless_forced(folder, adapted, said, tmp_path):
    other = tmp_path / "other"
    write_base(other, context=96)
    own = shutil.copytree(checkpoint.resolve(adapted) / "adapter", tmp_path / "alone")
    greedy = ("--temperature", 0, "--max-new-tokens", 2, "--dtype", "float32")
    for number, given in enumerate((adapted, checkpoint.resolve(adapted) / "adapter", own)):
        words = ("sample", other, "Question?", "--adapter", given, *greedy)
        status, _, errors = said(*words)
        assert (status, len(errors)) == (2, 1)
        assert "an adapter of another checkpoint" in errors[0]
        status, _, errors = said(*words, "--force")
        assert status == 0
        assert "--force: used anyway:" in errors[0]
        out = tmp_path / f"merged{number}"
        assert said("merge-lora", other, "--adapter", given, "--out", out)[0] == 2
        assert said("merge-lora", other, "--adapter", given, "--out", out, "--force")[0] == 0


def test_an_adapter_fits_the_base_that_its_parent_s_own_adapter_was_merged_into(
    folder, adapted, said, tmp_path
):
    status, _, errors = said(*words(folder, tmp_path / "second", "--lora.rank", 2, init="adapted"))
    assert status == 0, errors
    merged, other = tmp_path / "merged", tmp_path / "with another"
    assert said("merge-lora", adapted, "--out", merged)[0] == 0
    assert sampled(said, merged, "--adapter", tmp_path / "second")
    assert said("merge-lora", folder / "base", "--adapter", adapted, "--out", other)[0] == 0
    status, _, errors = said("sample", other, "x", "--adapter", adapted)
    assert (status, len(errors)) == (2, 1)
    assert "an adapter of another checkpoint" in errors[0]


def test_an_adapter_that_no_manifest_lists_is_not_used(folder, adapted, said, tmp_path):
    base = shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(checkpoint.resolve(adapted) / "adapter", base / "adapter")
    for given in (base, base / "adapter"):
        status, _, errors = said("sample", folder / "base", "x", "--adapter", given)
        assert (status, len(errors)) == (2, 1)
        assert "its manifest lists no adapter/adapter_config.json" in errors[0]


def test_verify_reads_the_optimizer_s_state_too(folder, adapted, said, tmp_path):
    run = shutil.copytree(checkpoint.resolve(adapted), tmp_path / "step-00000006")
    content = bytearray((run / "train" / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "train" / "state.safetensors").write_bytes(content)
    assert sampled(said, run)
    for verb in (("sample", run, "x"), ("merge-lora", run, "--out", tmp_path / "out")):
        status, _, errors = said(*verb, "--verify")
        assert (status, len(errors)) == (2, 1)
        assert "train/state.safetensors was altered" in errors[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--lora.rank", 400), "lora rank (400) must be at most 32: q is 32 x 32"),
        (("--lora.rank", -1), "--lora.rank -1: must be 0 or more"),
        (("--lora.rank", 4, "--lora.targets", "q,w"), "--lora.targets q,w: must be all, or some"),
        (("--lora.rank", 4, "--lora.alpha", 0), "--lora.alpha 0.0: must be above 0"),
        (("--last-layers", 3), "--last-layers 3: the model has 2 blocks"),
        (("--last-layers", 0), "--last-layers 0: must be above 0"),
        (("--last-layers", 1, "--lora.rank", 4), "give --lora.rank or --last-layers, not both"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(
    folder, said, tmp_path, more, says
):
    status, _, errors = said(*words(folder, tmp_path / "out", *more))
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_or_given_is_refused(folder, adapted, said, tmp_path):
    for given, says in [
        (("merge-lora", folder / "base", "--out", tmp_path / "o"), "has no adapter"),
        (("merge-lora", adapted, "--out", folder / "base"), "exists already"),
        (("merge-lora", adapted, "--adapter", adapted, "--out", tmp_path / "o"), "already"),
        (("sample", folder / "base", "x", "--adapter", tmp_path), "adapter_config.json: is miss"),
        (("sample", folder / "base", "x", "--adapter", folder / "base"), "adapter_config.json"),
    ]:
        status, _, errors = said(*given)
        assert (status, len(errors)) == (2, 1), errors
        assert says in errors[0]
        assert not (tmp_path / "o").exists()

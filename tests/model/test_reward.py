"""Reward models: what a head reads, what its numbers mean, and what a checkpoint keeps of it.

Every check of a silent bug is a function of the thing checked, shown to fail with the bug put in.
"""

import itertools
import json
import math
import statistics

import pytest
import torch
from tiny_models import SIZES

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import write_manifest
from openpalm.errors import CheckpointError, DataError, SettingsError
from openpalm.model.config import ModelConfig, RewardConfig, reward_from_json
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import initialise

VALUES = (1.0, 2.0, 4.0)
HEADS = {
    "scalar": RewardConfig(),
    "mean": RewardConfig(read="mean"),
    "marks": RewardConfig(read="mean", marks=True),
    "binned": RewardConfig("binned", VALUES),
    "ordinal": RewardConfig("ordinal", VALUES, members=3),
    "ensemble": RewardConfig(members=4, bias=True),
}


def reward_model(head: RewardConfig, **changes: object) -> RewardModel:
    """Random weights everywhere, marks and biases too; in eval mode."""
    model = RewardModel(ModelConfig(**(SIZES | changes)), head)  # type: ignore[arg-type]
    initialise(model, seed=1)
    with torch.no_grad():
        model.embedding *= 20
        for extra in (model.marks, model.reward_bias):
            if extra is not None:
                extra.copy_(torch.randn(extra.shape, generator=torch.Generator().manual_seed(2)))
    return model.eval()


@pytest.fixture(params=HEADS)
def model(request):
    return reward_model(HEADS[request.param])


def ragged():
    """Three rows of 9, 4 and 6 tokens padded with a token that means something."""
    ids = torch.randint(0, 265, (3, 9), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([9, 4, 6])
    return ids, torch.arange(9) < lengths[:, None], lengths, torch.tensor([3, 2, 5])


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def pieces(model, ids, prompt_length):
    """Final-norm states of one unpadded row, from the parts of a plain transformer."""
    added = None
    if model.marks is not None:
        added = torch.stack([model.marks[int(t >= prompt_length)] for t in range(len(ids))])[None]
    return model.norm(model.residual(ids[None], added=added))[0]


# --- what is read


def check_reads_each_row_alone(model, score):
    """Padded rows score as they do alone, from the state that the head shall read."""
    ids, mask, lengths, prompts = ragged()
    together = score(model, ids, mask, prompts)
    for row, (length, prompt) in enumerate(zip(lengths.tolist(), prompts.tolist(), strict=True)):
        states = pieces(model, ids[row, :length], prompt)
        state = states[-1] if model.reward.read == "last" else states.mean(dim=0)
        heads = model.reward_head.view(model.reward.members, -1, 32) @ state
        if model.reward_bias is not None:
            heads = heads + model.reward_bias.view(model.reward.members, -1)
        assert torch.allclose(together[row].flatten(), heads.mean(dim=0), atol=1e-5)


@torch.no_grad()
def test_a_padded_row_scores_as_it_does_alone(model):
    check_reads_each_row_alone(model, RewardModel.score)
    expected = (3,) if model.reward.kind == "scalar" else (3, model.reward.outputs)
    ids, mask, _, prompts = ragged()
    found = model.score(ids, mask, prompts)
    assert (found.shape, found.dtype) == (expected, torch.float32)


@torch.no_grad()
def test_reading_the_wrong_position_shows(model):
    def padding(model, ids, mask, prompts):
        return model.score(ids, None, prompts)

    def one_early(model, ids, mask, prompts):
        return model.score(ids, mask & mask.roll(-1, dims=1), prompts)

    fails(check_reads_each_row_alone, model, padding)
    fails(check_reads_each_row_alone, model, one_early)


def check_padding_is_never_read(model, score):
    ids, mask, _, prompts = ragged()
    other = torch.where(mask, ids, 7)
    assert torch.equal(score(model, ids, mask, prompts), score(model, other, mask, prompts))


@torch.no_grad()
def test_what_the_padding_is_changes_nothing(model):
    check_padding_is_never_read(model, RewardModel.score)
    fails(check_padding_is_never_read, model, lambda m, ids, mask, p: m.score(ids, None, p))


@torch.no_grad()
def test_marks_tell_prompt_from_answer():
    model = reward_model(HEADS["marks"])
    ids, mask, _, prompts = ragged()
    marked = model.score(ids, mask, prompts)
    assert not torch.allclose(marked, model.score(ids, mask), atol=1e-3)
    assert not torch.allclose(marked, model.score(ids, mask, prompts + 1), atol=1e-3)
    model.marks.zero_()
    assert torch.equal(model.score(ids, mask, prompts), model.score(ids, mask))


@torch.no_grad()
def test_without_marks_the_prompts_length_changes_nothing():
    model = reward_model(HEADS["scalar"])
    ids, mask, _, prompts = ragged()
    assert torch.equal(model.score(ids, mask, prompts), model.score(ids, mask))


@torch.no_grad()
def test_the_final_norm_is_applied_even_where_logits_do_without():
    ids, mask, _, prompts = ragged()
    kinds = [reward_model(HEADS["scalar"], norm_before_head=before) for before in (True, False)]
    assert torch.equal(*(model.score(ids, mask, prompts) for model in kinds))


def test_a_row_without_a_real_token_is_refused(model):
    ids, mask, _, _ = ragged()
    mask[1] = False
    with pytest.raises(DataError, match="no real token"):
        model.score(ids, mask)


@torch.no_grad()
def test_in_bfloat16_rewards_stay_float32(model):
    ids, mask, _, prompts = ragged()
    exact = model.score(ids, mask, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.score(ids, mask, prompts)
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, atol=0.5)


# --- what the numbers mean


def test_the_reward_of_bins_is_their_expectation():
    model = reward_model(HEADS["binned"])
    logits = torch.tensor([0.5, -1.0, 2.0])
    weights = [math.exp(x) for x in logits.tolist()]
    expected = sum(w * v for w, v in zip(weights, VALUES, strict=True)) / sum(weights)
    assert model.expected(logits).item() == pytest.approx(expected)


def test_the_reward_of_an_ordinal_scale_is_its_expectation():
    """Chances of each value are the differences of the chances to lie above."""
    model = reward_model(HEADS["ordinal"])
    logits = torch.tensor([1.5, -0.5])
    above = [1.0, *(1 / (1 + math.exp(-x)) for x in logits.tolist()), 0.0]
    chances = [a - b for a, b in itertools.pairwise(above)]
    assert sum(chances) == pytest.approx(1)
    expected = sum(c * v for c, v in zip(chances, VALUES, strict=True))
    assert model.expected(logits).item() == pytest.approx(expected)


@torch.no_grad()
def test_members_are_averaged_and_their_spread_is_their_deviation(model):
    ids, mask, _, prompts = ragged()
    scores = model.member_scores(ids, mask, prompts)
    rewards = model.expected(scores).T.tolist()
    expected = [statistics.fmean(row) for row in rewards]
    assert model.value(ids, mask, prompts).tolist() == pytest.approx(expected, abs=1e-5)
    spread = [statistics.pstdev(row) for row in rewards]
    assert model.spread(ids, mask, prompts).tolist() == pytest.approx(spread, abs=1e-5)
    assert (min(spread) > 1e-3) == (model.reward.members > 1)


@pytest.mark.parametrize("kind", HEADS)
def test_fresh_heads_begin_apart_and_without_an_opinion(kind):
    model, again = reward_model(HEADS[kind]), reward_model(HEADS[kind])
    initialise_heads(model, seed=5, offset=3.0)
    initialise_heads(again, seed=5, offset=3.0)
    assert torch.equal(model.reward_head, again.reward_head)
    initialise_heads(again, seed=6)
    assert not torch.equal(model.reward_head, again.reward_head)
    heads = model.reward_head.view(model.reward.members, -1)
    assert len({tuple(head.tolist()) for head in heads}) == model.reward.members
    if kind in ("binned", "ordinal"):  # all values alike
        biases = model.reward_bias.view(model.reward.members, -1)
        even = torch.full((model.reward.members,), statistics.fmean(VALUES))
        assert torch.allclose(model.expected(biases.detach()), even)
    elif model.reward_bias is not None:
        assert model.reward_bias.tolist() == [3.0] * 4
    if model.marks is not None:
        assert not model.marks.any()


# --- what a config may say


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"members": 0}, "members"),
        ({"members": 65}, "members"),
        ({"kind": "binned"}, "values"),
        ({"kind": "binned", "values": [1.0]}, "values"),
        ({"kind": "binned", "values": [2.0, 1.0]}, "rise"),
        ({"kind": "binned", "values": [1, 10**400]}, "finite"),
        ({"kind": "binned", "values": [math.nan, 1.0]}, "rise"),
        (
            {"kind": "binned", "values": ["1", "2"]},
            "cannot be .*; it must be a list of numbers",
        ),
        ({"kind": "ordinal", "values": [0.0] * 5000}, "values"),
        ({"values": [1.0, 2.0]}, "values"),
        ({"kind": "cubic"}, "kind cannot be"),
        ({"read": "first"}, "read cannot be"),
        ({"marks": 1}, "marks cannot be"),
        ({"wings": 2}, "unknown reward field wings"),
        ([], "must be a JSON object"),
    ],
)
def test_configs_that_cannot_be(fields, says):
    with pytest.raises(SettingsError, match=says):
        reward_from_json(fields, "config.json")


# --- the checkpoint


def test_a_checkpoint_gives_back_the_same_reward_model(model, tmp_path):
    ids, mask, _, prompts = ragged()
    checkpoint.save(tmp_path / "ckpt", model, fingerprint=True)
    loaded = checkpoint.load(tmp_path / "ckpt")
    assert isinstance(loaded, RewardModel)
    assert loaded.reward == model.reward
    assert torch.equal(loaded.score(ids, mask, prompts), model.score(ids, mask, prompts))
    assert torch.equal(loaded.logits(ids), model.logits(ids)), "the trunk is a whole transformer"
    with pytest.raises(CheckpointError, match="is a reward model"):
        checkpoint.check_generates_text(tmp_path / "ckpt")


def test_the_fingerprint_is_of_the_head(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "ckpt", reward_model(HEADS["marks"]), fingerprint=True)
    checkpoint.load(tmp_path / "ckpt")
    changed = RewardModel.member_scores
    monkeypatch.setattr(RewardModel, "member_scores", lambda *given: -changed(*given))
    with pytest.raises(CheckpointError, match="computes other logits"):
        checkpoint.load(tmp_path / "ckpt")


def rewritten(directory, reward):
    """config.json with another reward object, the manifest made to agree, as an attacker would."""
    file = directory / "config.json"
    content = json.loads(file.read_text()) | {"reward": reward}
    file.write_text(json.dumps(content))
    (directory / "manifest.json").unlink()
    write_manifest(directory, {})


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"members": 64}, "another model"),
        ({"kind": "binned", "values": [1, 2]}, "another model"),
        ({"marks": True}, "another model"),
        ({"members": 10**9}, "members"),
        ([1], "must be a JSON object"),
        (None, "must be a JSON object"),
    ],
)
def test_a_hostile_reward_object_is_one_clear_line(tmp_path, reward, says):
    checkpoint.save(tmp_path / "ckpt", reward_model(HEADS["scalar"]))
    rewritten(tmp_path / "ckpt", reward)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load(tmp_path / "ckpt")

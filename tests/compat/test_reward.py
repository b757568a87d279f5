"""RewardModel: outputs and state dicts of the original, bins, prompts, finetuning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import PARITY, array, check_state, empty, kept, saved, small
from parity_cases import DATA

from openpalm.compat.palm_rlhf_pytorch import RewardModel
from openpalm.convert.detect import read_foreign
from openpalm.errors import DataError, SettingsError


@pytest.fixture(params=["reward_scalar", "reward_binned"])
def folder(request: pytest.FixtureRequest) -> Path:
    return DATA / "palm-rlhf-pytorch" / "v0.8.0" / request.param


def reward_of(folder: Path, **more: Any) -> RewardModel:
    said = json.loads((folder / "config.json").read_text())
    bins, rank = said["num_binned_output"], said["lora_r"]
    model = RewardModel(empty(folder), num_binned_output=bins, lora_r=rank, **more)
    model.load(folder / "reward.pt")
    return model.eval()


@torch.no_grad()
def test_every_reward_is_the_originals(folder: Path):
    model = reward_of(folder, sample_from_bins=False)
    tokens, labels, lengths, mask = (
        array(folder, what) for what in ("tokens", "labels", "prompt_lengths", "mask")
    )
    prompt = torch.arange(tokens.shape[1]) < lengths[:, None]
    found = {
        "logits": model(tokens, mask=mask, prompt_lengths=lengths),
        "out_plain": model(tokens),
        "out_prompt_lengths": model(tokens, prompt_mask=prompt),
        "out_no_lora": model(tokens, mask=mask, prompt_lengths=lengths, disable_lora=True),
        "loss": model(tokens, mask=mask, prompt_mask=prompt, labels=labels),
    }
    for what, tensor in found.items():
        assert tensor.shape == array(folder, what).shape, what
        assert (tensor - array(folder, what)).abs().max() < PARITY, what


def test_its_state_dict_is_the_originals(folder: Path, tmp_path: Path):
    original = saved(folder, "reward.pt")
    model = reward_of(folder)
    check_state(model.state_dict(), original)
    palm = model.state_dict()
    assert palm["palm.to_logits.weight"].data_ptr() == palm["palm.token_emb.weight"].data_ptr()
    torch.save(model.state_dict(), tmp_path / "reward.pt")
    assert read_foreign(tmp_path / "reward.pt").reward is not None
    named = RewardModel(empty(folder), reward_lora_scope="judge")
    assert "palm.finetune_modules.judge.0.0.A" in named.state_dict()
    named.load_state_dict(named.state_dict())
    plain = RewardModel(empty(folder), use_lora=False)
    assert not any("finetune" in key for key in plain.state_dict())
    plain.load_state_dict(plain.state_dict())


@torch.no_grad()
def test_a_binned_reward_is_the_expected_bin_unless_sampled():
    folder = DATA / "palm-rlhf-pytorch" / "v0.8.0" / "reward_binned"
    tokens, lengths, mask = (array(folder, n) for n in ("tokens", "prompt_lengths", "mask"))
    chances = array(folder, "logits").softmax(dim=-1)
    model = reward_of(folder)
    reward = model(tokens, mask=mask, prompt_lengths=lengths)
    assert torch.allclose(reward, chances @ torch.arange(5.0), atol=PARITY)
    assert reward.tolist() == pytest.approx(model.rewards(tokens, mask, lengths), abs=1e-6)
    drawing = reward_of(folder, sample_from_bins=True)
    torch.manual_seed(0)
    drawn = torch.stack([drawing(tokens, mask=mask, prompt_lengths=lengths) for _ in range(2000)]).T
    counts = torch.stack([(drawn == k).float().mean(dim=1) for k in range(5)], dim=1)
    assert (counts - chances).abs().max() < 0.05
    sure = reward_of(folder, sample_from_bins=True, sample_temperature=1e-6)
    picked = sure(tokens, mask=mask, prompt_lengths=lengths)
    assert torch.equal(picked, chances.argmax(dim=-1))


def test_prompts_are_said_once_and_come_first():
    model, ids = RewardModel(small()), torch.arange(6)[None]
    with pytest.raises(SettingsError, match="one of them"):
        model(ids, prompt_mask=ids < 2, prompt_lengths=torch.tensor([2]))
    with pytest.raises(DataError, match="after a token of the response"):
        model(ids, prompt_mask=ids > 3)
    with pytest.raises(DataError, match="no real token"):
        model(ids, mask=ids > 9)


def test_finetuning_changes_the_factors_and_the_head_alone():
    palm = small(dim=32)
    model = RewardModel(palm, num_binned_output=2, dropout=0.0)
    before = kept(model)
    optimizer = torch.optim.Adam(model.finetune_parameters(), lr=1e-2)
    ids, labels = torch.randint(20, (16, 8)), torch.arange(16) % 2
    first = model(ids, prompt_lengths=torch.full((16,), 3), labels=labels).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, prompt_lengths=torch.full((16,), 3), labels=labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 4
    changed = {k for k, tensor in model.state_dict().items() if not torch.equal(tensor, before[k])}
    learnt = ("finetune_modules", "to_pred", "prompt_embed", "response_embed")
    assert changed == {key for key in before if any(word in key for word in learnt)}
    assert torch.equal(palm.state_dict()["norm.gamma"], before["palm.norm.gamma"])  # a copy


def test_dropout_is_the_reward_models_own():
    palm, ids = small(), torch.arange(10)[None]
    model = RewardModel(palm)
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))
    assert torch.equal(palm(ids), palm(ids))

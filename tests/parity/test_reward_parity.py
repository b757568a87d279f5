"""palm-rlhf-pytorch's RewardModel gives the same rewards here, with and without LoRA, and back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import openpalm
from openpalm.cli.main import main
from openpalm.convert.detect import read_foreign
from openpalm.convert.palm_rlhf.reward import write_reward
from openpalm.errors import CheckpointError
from openpalm.model import lora
from openpalm.model.config import LoraConfig, RewardConfig
from openpalm.model.reward import RewardModel

DATA = Path(__file__).parent / "data" / "palm-rlhf-pytorch" / "v0.8.0"
PARITY = 1e-4


@pytest.fixture(params=["reward_scalar", "reward_binned"])
def folder(request: pytest.FixtureRequest) -> Path:
    return DATA / request.param


def array(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.npy"))


def loaded(folder: Path, out: Path) -> RewardModel:
    """As a user gets it: converted, then read from the checkpoint."""
    assert main(["convert", str(folder), str(out)]) == 0
    model = openpalm.load(out)
    assert isinstance(model, RewardModel)
    return model


def check_scores(folder: Path, model: RewardModel) -> None:
    """Every output that the original's own run left."""
    tokens, mask, lengths = (array(folder, n) for n in ("tokens", "mask", "prompt_lengths"))
    labels = array(folder, "labels")
    scores = model.score(tokens, mask=mask, prompt_lengths=lengths)
    plain_loss = F.mse_loss if model.reward.kind == "scalar" else F.cross_entropy
    found = {
        "logits": scores,
        "out_plain": model.score(tokens),
        "out_prompt_lengths": model.score(tokens, prompt_lengths=lengths),
        "loss": plain_loss(scores, labels),
    }
    with lora.detached(model):
        found["out_no_lora"] = model.score(tokens, mask=mask, prompt_lengths=lengths)
    for name, tensor in found.items():
        assert tensor.shape == array(folder, name).shape, name
        assert (tensor - array(folder, name)).abs().max() < PARITY, name


@torch.no_grad()
def test_every_output_is_the_originals(folder: Path, tmp_path: Path):
    check_scores(folder, loaded(folder, tmp_path / "ours"))


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["read", "marks", "factors", "head"])
def test_a_wrong_reading_shows(folder: Path, tmp_path: Path, wrong: str):
    model = loaded(folder, tmp_path / "ours")
    if wrong == "read":
        model.reward = replace(model.reward, read="last")
    elif wrong == "marks":
        assert model.marks is not None
        model.marks.copy_(model.marks.flip(0))
    elif wrong == "factors":
        block = model.blocks[0]
        for target in ("k", "v"):  # one for the other
            block.project_in.lora[target].b.neg_()
    else:
        model.reward_head.neg_()
    with pytest.raises(AssertionError):
        check_scores(folder, model)


@torch.no_grad()
def test_bins_stand_for_the_ratings_from_one(tmp_path: Path):
    folder = DATA / "reward_binned"
    model = loaded(folder, tmp_path / "ours")
    given = [array(folder, name) for name in ("tokens", "mask", "prompt_lengths")]
    chances = array(folder, "logits").softmax(dim=-1)
    expected = chances @ torch.arange(1.0, 6.0)
    assert torch.allclose(model.value(*given), expected, atol=PARITY)


def test_back_to_the_originals_own_tensors(folder: Path, tmp_path: Path):
    loaded(folder, tmp_path / "ours")
    words = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert main([*words, "--to", "palm-rlhf-pytorch"]) == 0
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"reward.pt", "config.json"}
    written = torch.load(tmp_path / "theirs" / "reward.pt", weights_only=True)
    original = torch.load(folder / "reward.pt", weights_only=True)
    assert set(written) == set(original)
    for name, tensor in original.items():
        assert written[name].shape == tensor.shape, name
        # One is added to gammas and taken off again, which rounds; all else is the same bits.
        same = torch.allclose(written[name], tensor, rtol=0, atol=1e-7)
        assert same if name.endswith("gamma") else torch.equal(written[name], tensor), name
    said = json.loads((tmp_path / "theirs" / "config.json").read_text())
    known = json.loads((folder / "config.json").read_text())
    for name in ("num_tokens", "dim", "depth", "num_binned_output", "use_lora", "lora_r"):
        assert said[name] == known[name], name
    again = loaded(tmp_path / "theirs", tmp_path / "again")
    with torch.no_grad():
        check_scores(folder, again)


# --- what a file may hold


@pytest.fixture
def state() -> dict[str, Tensor]:
    return torch.load(DATA / "reward_scalar" / "reward.pt", weights_only=True)


def read(tmp_path: Path, state: dict[str, Tensor], **config: object):
    torch.save(state, tmp_path / "reward.pt")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return read_foreign(tmp_path / "reward.pt")


def test_without_factors_there_is_no_adapter(tmp_path: Path, state: dict[str, Tensor]):
    bare = {name: tensor for name, tensor in state.items() if "finetune" not in name}
    foreign = read(tmp_path, bare)
    assert foreign.lora is None
    folder = DATA / "reward_scalar"
    given = [array(folder, name) for name in ("tokens", "mask", "prompt_lengths")]
    difference = foreign.model().score(*given) - array(folder, "out_no_lora")  # type: ignore[operator]
    assert difference.abs().max() < PARITY


def test_the_scope_that_is_not_the_rewards_is_left_out(tmp_path: Path, state: dict[str, Tensor]):
    other = {n.replace(".reward.", ".actor."): -t for n, t in state.items() if "finetune" in n}
    foreign = read(tmp_path, state | other)
    assert "dropped: the LoRA factors of scope actor" in foreign.notes
    right = read(tmp_path, state).state
    assert all(torch.equal(tensor, right[name]) for name, tensor in foreign.state.items())
    named = read(tmp_path, state | other, reward_lora_scope="actor")
    assert torch.equal(
        named.state["blocks.0.project_in.lora.q.a"], -right["blocks.0.project_in.lora.q.a"]
    )
    with pytest.raises(CheckpointError, match="none named critic"):
        read(tmp_path, state | other, reward_lora_scope="critic")
    assert read(tmp_path, state, use_lora=False).lora is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"palm.finetune_modules.reward.0.3.A": torch.zeros(16, 4)}, "0.3.A is"),
        ({"palm.finetune_modules.reward.0.4.A": torch.zeros(16, 4)}, "0.4.A"),
        ({"to_pred.0.weight": torch.zeros(2, 16)}, "to_pred.0.weight is"),
        ({"to_pred.weight": torch.zeros(3, 16), "to_pred.bias": torch.zeros(3)}, "to_pred.0"),
        ({"to_pred.weight": torch.zeros(1, 16)}, "has 1 bins"),
        ({"to_pred.weight": torch.zeros(9999, 16)}, "has 9999 bins"),
        ({"prompt_embed": torch.zeros(1, 1, 8)}, "prompt_embed is"),
        ({"response_embed": torch.full((1, 1, 16), torch.inf)}, "infinite"),
        ({"wings": torch.zeros(2)}, "wings"),
    ],
)
def test_a_file_that_contradicts_itself_is_one_clear_line(
    tmp_path: Path, state: dict[str, Tensor], change: dict[str, Tensor], says: str
):
    with pytest.raises(CheckpointError, match=says):
        read(tmp_path, state | change).model()


def test_a_config_that_contradicts_the_file(tmp_path: Path, state: dict[str, Tensor]):
    with pytest.raises(CheckpointError, match="num_binned_output is 5"):
        read(tmp_path, state, num_binned_output=5)
    with pytest.raises(CheckpointError, match="lora_r is 8"):
        read(tmp_path, state, lora_r=8)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (RewardConfig(), "cannot express read=last"),
        (RewardConfig(read="mean", members=2), "members 2"),
        (RewardConfig(read="mean", bias=True), "the bias"),
        (RewardConfig("ordinal", (1.0, 2.0), read="mean"), "kind ordinal"),
        (RewardConfig("binned", (1.0, 1.5), read="mean"), "not 1 apart"),
    ],
)
def test_what_the_original_cannot_say_is_named(reward: RewardConfig, says: str):
    config = read_foreign(DATA / "reward_scalar").config
    with pytest.raises(CheckpointError, match=says):
        write_reward(RewardModel(config, reward))


@torch.no_grad()
def test_another_adapter_is_written_as_the_originals_or_refused(tmp_path: Path):
    """Targets it lacks become zeros, another alpha goes into B."""
    foreign = read_foreign(DATA / "reward_scalar")
    model = RewardModel(foreign.config, RewardConfig(read="mean"))
    for name, parameter in model.named_parameters():
        parameter.copy_(foreign.state.get(name, torch.zeros_like(parameter)))
    lora.attach(model, LoraConfig(2, 6.0, ("v", "out")), seed=0)
    for factor in lora.adapter_parameters(model).values():
        factor.normal_(generator=torch.Generator().manual_seed(0))
    _, state, _ = write_reward(model)
    again = read(tmp_path, state)
    tokens = array(DATA / "reward_scalar", "tokens")
    assert torch.allclose(again.model().score(tokens), model.score(tokens), atol=1e-5)  # type: ignore[operator]
    lora.merge(model)
    lora.attach(model, LoraConfig(2, 6.0, ("up",)), seed=0)
    with pytest.raises(CheckpointError, match="LoRA on up"):
        write_reward(model)

"""Adapters as directories: PEFT's layout out and in, and nothing damaged or hostile gets in."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from small_models import BASE, SHAPES, ids_for, make

from openpalm.checkpoint import adapter
from openpalm.checkpoint import directory as checkpoint
from openpalm.errors import CheckpointError
from openpalm.model import lora
from openpalm.model.config import LoraConfig

CONFIG = SHAPES["grouped"]
PREFIX = "base_model.model.blocks."


def adapted(config=CONFIG, low_rank=None):
    model = make(config)
    lora.attach(model, low_rank or LoraConfig(3, 12.0, ("k", "up", "down")), seed=0)
    for factor in lora.adapter_parameters(model.requires_grad_(False)).values():
        factor += 0.3 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def model():
    return adapted()


def write(directory, model, base=None):
    """The adapter of a checkpoint of the model."""
    checkpoint.save(directory.parent / "checkpoint", model, lineage={"parent": base})
    shutil.copytree(directory.parent / "checkpoint" / "adapter", directory)


@pytest.fixture
def written(model, tmp_path):
    write(tmp_path / "adapter", model)
    return tmp_path / "adapter"


def test_the_layout_is_peft_s(model, written):
    """Keys, shapes and settings that PEFT 0.21 reads onto modules of these names."""
    content = json.loads((written / "adapter_config.json").read_text())
    assert (content["peft_type"], content["r"], content["lora_alpha"]) == ("LORA", 3, 12.0)
    assert content["target_modules"] == ["k", "up", "down"]
    stored = safetensors.torch.load_file(written / "adapter_model.safetensors")
    assert len(stored) == 2 * 3 * CONFIG.depth
    keys = CONFIG.kv_heads * CONFIG.head_dim
    assert stored[f"{PREFIX}1.project_in.k.lora_A.weight"].shape == (3, CONFIG.dim)
    assert stored[f"{PREFIX}1.project_in.k.lora_B.weight"].shape == (keys, 3)
    down = model.blocks[0].project_out.lora["down"]
    assert torch.equal(stored[f"{PREFIX}0.project_out.down.lora_B.weight"], down.b)


def check_read_back(model, directory):
    fresh = make(CONFIG)
    adapter.load_adapter(fresh, directory)
    assert lora.config_of(fresh) == lora.config_of(model)
    assert torch.equal(fresh.logits(ids_for(CONFIG)), model.logits(ids_for(CONFIG)))


def test_what_was_written_is_read_back(model, written):
    check_read_back(model, written)
    weights = written / "adapter_model.safetensors"
    stored = safetensors.torch.load_file(weights)
    first, second = (f"{PREFIX}{i}.project_in.k.lora_A.weight" for i in (0, 1))
    stored[first], stored[second] = stored[second], stored[first]  # layers mixed up
    safetensors.torch.save_file(stored, weights)
    with pytest.raises(AssertionError):
        check_read_back(model, written)


def test_a_pattern_of_targets_and_unknown_settings_are_fine(model, written):
    change(written, target_modules="all-linear", use_dora=False, rank_pattern={}, newer=None)
    check_read_back(model, written)


def change(directory, **values):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def replace_weights(directory, change_keys):
    file = directory / "adapter_model.safetensors"
    safetensors.torch.save_file(change_keys(safetensors.torch.load_file(file)), file)


def without_one(stored):
    del stored[f"{PREFIX}1.project_in.k.lora_A.weight"]
    return stored


HOSTILE = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "is missing"),
    "config is no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "JSON object"),
    "another method": (lambda d: change(d, peft_type="IA3"), "only LORA"),
    "dora": (lambda d: change(d, use_dora=True), "use_dora is set"),
    "ranks that differ": (lambda d: change(d, rank_pattern={"k": 8}), "rank_pattern is set"),
    "trained biases": (lambda d: change(d, bias="all"), "bias 'all'"),
    "pissa": (lambda d: change(d, init_lora_weights="pissa"), "'pissa' can change the base"),
    "pissa, fast": (lambda d: change(d, init_lora_weights="pissa_niter_16"), "can change the base"),
    "olora": (lambda d: change(d, init_lora_weights="olora"), "can change the base"),
    "corda": (lambda d: change(d, init_lora_weights="corda"), "can change the base"),
    "loftq": (lambda d: change(d, init_lora_weights="loftq"), "can change the base"),
    "a factor that is nan": (
        lambda d: replace_weights(d, lambda s: {k: v * float("nan") for k, v in s.items()}),
        "not finite",
    ),
    "rank of another": (lambda d: change(d, r=4), "another model"),
    "rank too large": (lambda d: change(d, r=1 << 40), "do not make an adapter"),
    "rank above the sizes": (lambda d: change(d, r=1 << 20), "must be at most"),
    "rank is text": (lambda d: change(d, r="3"), "do not make an adapter"),
    "alpha is endless": (lambda d: change(d, lora_alpha=float("inf")), "do not make an adapter"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "other formats"),
    "no safetensors": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04"),
        "cannot be read",
    ),
    "no factors": (lambda d: replace_weights(d, lambda s: {}), "0 stored factors"),
    "a factor missing": (lambda d: replace_weights(d, without_one), "is absent"),
    "a factor too many": (
        lambda d: replace_weights(d, lambda s: s | {f"{PREFIX}9.project_in.k.lora_A.weight": s[
            f"{PREFIX}0.project_in.k.lora_A.weight"].clone()}),
        "needs absent",
    ),
    "another kind of model": (
        lambda d: replace_weights(d, lambda s: {k.replace("blocks", "h"): v for k, v in s.items()}),
        "another kind of model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_adapter_of_this_model_is_refused(written, kind):
    spoil, says = HOSTILE[kind]
    spoil(written)
    model = make(CONFIG)
    with pytest.raises(CheckpointError, match=says) as caught:
        adapter.load_adapter(model, written)
    assert "\n" not in str(caught.value)
    assert not lora.is_attached(model)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_keeps_the_base_is_fine(model, written, start):
    change(written, init_lora_weights=start)
    check_read_back(model, written)


OURS, OTHER = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("written_for", "made_for", "fits"),
    [
        (OURS, None, True),
        (OTHER, None, False),
        (None, OTHER, False),
        (None, OURS, True),
        (None, None, True),
        ("main", None, True),  # what PEFT calls a revision
    ],
)
def test_an_adapter_of_another_checkpoint_is_refused(model, tmp_path, written_for, made_for, fits):
    write(tmp_path / "adapter", model, base=written_for)
    given = {"bases": {OURS}, "made_for": made_for}
    said = []
    fresh = make(CONFIG)
    if not fits:
        with pytest.raises(CheckpointError, match="an adapter of another checkpoint"):
            adapter.load_adapter(fresh, tmp_path / "adapter", **given)
    adapter.load_adapter(fresh, tmp_path / "adapter", **given, allow=said.append)
    assert len(said) == (not fits)
    assert lora.is_attached(fresh)


def test_a_second_adapter_is_refused(model, written):
    with pytest.raises(CheckpointError, match="merge-lora"):
        adapter.load_adapter(model, written)


def test_an_adapter_of_another_size_is_refused(written):
    with pytest.raises(CheckpointError, match="another model"):
        adapter.load_adapter(make(BASE), written)  # one key/value head, not two


# --- in a checkpoint


@pytest.fixture
def saved(model, tmp_path):
    checkpoint.save(tmp_path / "saved", model, fingerprint=True)
    return tmp_path / "saved"


def test_a_checkpoint_has_it_twice_and_loads_attached(model, saved):
    loaded = checkpoint.load(saved)
    assert lora.config_of(loaded) == lora.config_of(model)
    assert torch.equal(loaded.logits(ids_for(CONFIG)), model.logits(ids_for(CONFIG)))
    check_read_back(model, saved / "adapter")


def test_a_checkpoint_without_one_has_no_trace_of_it(tmp_path):
    checkpoint.save(tmp_path / "plain", make(CONFIG))
    assert "lora" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / "adapter").exists()


@pytest.mark.parametrize(
    ("low_rank", "says"),
    [
        ({"rank": 1 << 30, "alpha": 1.0, "targets": ["k"]}, "must be at most"),
        ({"rank": 2, "alpha": 1.0, "targets": ["k"]}, "another model"),
        ({"rank": 8, "alpha": 1.0, "targets": ["q", "k", "gate", "up", "out"]}, "too few"),
        ("q", "rank, alpha and targets"),
    ],
)
def test_a_config_that_lies_about_the_adapter_is_refused(saved, low_rank, says):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora": low_rank}))
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load_config(saved)


def test_weights_of_another_adapter_do_not_fill_this_one(saved, tmp_path):
    other = adapted(low_rank=LoraConfig(3, 6.0, ("k", "up", "down")))
    with pytest.raises(CheckpointError, match="adapter"):
        checkpoint.load_weights(other, saved)
    shutil.rmtree(saved)
    checkpoint.save(saved, make(CONFIG))
    with pytest.raises(CheckpointError, match="adapter"):
        checkpoint.load_weights(other, saved)

"""Project and sizes are detected from the tensors; other statements must agree."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openpalm.convert.detect import read_foreign
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig

Save = Callable[..., Path]


def says(tmp_path: Path, **values: object) -> Path:
    path = tmp_path / "said.json"
    path.write_text(json.dumps(values))
    return path


def test_everything_is_inferred(saved: Save, palm: dict[str, Tensor], config: ModelConfig):
    foreign = read_foreign(saved(palm))
    assert foreign.config == config
    assert foreign.project == "palm-rlhf-pytorch"
    assert foreign.state["embedding"].shape == (128, 8)
    assert not foreign.state["embedding"][70:].any()


def test_a_missing_key_takes_the_originals_default(
    tmp_path: Path, saved: Save, palm: dict[str, Tensor]
):
    path = saved(palm)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 8, "attn_dropout": 0.1}))
    assert read_foreign(path).config.xpos_base == 512
    assert "config.json" in "".join(read_foreign(path).notes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"heads": 8}, "heads is 8, but the tensors say 2"),
        ({"dim_head": 64}, "dim_head is 64"),
        ({"depth": 3}, "depth is 3"),
        ({"num_tokens": 96}, "num_tokens is 96"),
        ({"ff_mult": 4}, "ff_mult is 4, but the tensors say 2"),
        ({"qk_rmsnorm": True}, "qk_rmsnorm is True, but the tensors say False"),
        ({"depth": 10**30}, "depth cannot be 10"),
        ({"depth": "2"}, "depth cannot be '2'"),
        ({"depth": True}, "depth cannot be True"),
        ({"causal": "yes"}, "causal cannot be 'yes'"),
        ({"rotary_xpos_scale_base": 0}, "rotary_xpos_scale_base cannot be 0"),
        ({"rotary_xpos_scale_base": "512"}, "rotary_xpos_scale_base cannot be '512'"),
    ],
)
def test_contradictions_are_named(
    tmp_path: Path, saved: Save, palm: dict[str, Tensor], values: dict, said: str
):
    given = says(tmp_path, **values)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_foreign(saved(palm), config_path=given)
    assert str(given) in str(caught.value)


def test_hyperparameters_that_no_tensor_shows_are_taken(
    tmp_path: Path, saved: Save, palm: dict[str, Tensor]
):
    path = saved(palm)
    assert read_foreign(path, config_path=says(tmp_path, rotary_xpos_scale_base=64)).config == (
        dataclasses.replace(read_foreign(path).config, xpos_base=64.0)
    )
    encoder = read_foreign(path, config_path=says(tmp_path, causal=False))
    assert (encoder.config.causal, encoder.config.xpos_base) == (False, 0.0)
    assert "not used: wings" in "".join(
        read_foreign(path, config_path=says(tmp_path, wings=2)).notes
    )


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\udce4"])
def test_a_config_that_is_no_json_object(
    tmp_path: Path, saved: Save, palm: dict[str, Tensor], text: str
):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"odd\.json"):
        read_foreign(saved(palm), config_path=path)


def test_a_missing_or_huge_config(tmp_path: Path, saved: Save, palm: dict[str, Tensor]):
    with pytest.raises(CheckpointError, match=r"none\.json: is missing; check the path"):
        read_foreign(saved(palm), config_path=tmp_path / "none.json")
    (tmp_path / "big.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(CheckpointError, match=r"big\.json: too large"):
        read_foreign(saved(palm), config_path=tmp_path / "big.json")


FIRST = "layers.0.fn."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{FIRST}attn_out.weight": None}, "no known project"),
        ({"layers.1.fn.fused_attn_ff_proj.weight": None}, "holds no layers.1"),
        ({"token_emb.weight": None, "to_logits.weight": None}, "holds no to_logits.weight"),
        ({"norm.gamma": torch.ones(9)}, r"norm.gamma is \[9\]"),
        ({"norm.gamma": torch.ones(2, 4)}, "not 1-d"),
        ({"norm.gamma": torch.zeros(0)}, "not 1-d"),
        ({f"{FIRST}ff_out.2.weight": torch.zeros(8, 15)}, "fused rows"),
        ({f"{FIRST}attn_out.weight": torch.zeros(8, 0)}, "not 2-d"),
        ({"token_emb.weight": torch.zeros(70, 8)}, "differ, but the original ties them"),
        ({f"{FIRST}norm.beta": torch.ones(8)}, "differs from the value that the project computes"),
        (
            {f"{FIRST}rotary_emb.inv_freq": torch.ones(2)},
            "differs from the value that the project computes",
        ),
        (
            {f"{FIRST}rotary_emb.scale": torch.ones(2)},
            "differs from the value that the project computes",
        ),
        ({"extra": torch.ones(2)}, r"1 tensor .*\(extra\)"),
        ({"norm.gamma": torch.full((8,), torch.nan)}, "infinite or undefined"),
    ],
)
def test_what_does_not_fit_is_named(
    saved: Save, palm: dict[str, Tensor], change: dict[str, Tensor | None], said: str
):
    changed = {name: tensor for name, tensor in (palm | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=said) as caught:
        read_foreign(saved(changed))
    assert "\n" not in str(caught.value)


def test_either_name_of_the_table_and_both_places_of_ff_out(saved: Save, palm: dict[str, Tensor]):
    expected = read_foreign(saved(palm)).state
    del palm["token_emb.weight"]
    for i in range(2):
        palm[f"layers.{i}.fn.ff_out.1.weight"] = palm.pop(f"layers.{i}.fn.ff_out.2.weight")
    found = read_foreign(saved(palm)).state
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parameters_without_buffers_read_alike(saved: Save, palm: dict[str, Tensor]):
    expected = read_foreign(saved(palm))
    bare = {n: t for n, t in palm.items() if "rotary_emb" not in n and "beta" not in n}
    found = read_foreign(saved(bare))
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)


def test_no_saved_scale_means_no_xpos(saved: Save, palm: dict[str, Tensor]):
    bare = {n: t for n, t in palm.items() if "rotary_emb.scale" not in n}
    assert read_foreign(saved(bare)).config.xpos_base == 0
    for name, tensor in bare.items():
        if name.endswith("gamma"):
            tensor += 1
    assert "adds the residual stream twice" in "".join(read_foreign(saved(bare)).notes)
    bare["norm.gamma"].fill_(1)
    untrained = read_foreign(saved(bare))
    assert untrained.era == "0.0.30"
    assert not untrained.config.norm_before_head


def test_an_untrained_final_norm_betrays_its_era(saved: Save, palm: dict[str, Tensor]):
    for name, tensor in palm.items():
        if name.endswith("gamma"):
            tensor += 1
    palm["norm.gamma"].fill_(1)
    foreign = read_foreign(saved(palm))
    assert foreign.era == "0.1.0 to 0.2.0"
    assert "never trained" in foreign.why
    for name, tensor in palm.items():
        if name.endswith("gamma"):
            tensor.fill_(1)  # nothing was trained: says nothing
    assert read_foreign(saved(palm)).era == "0.2.1 to 0.2.3"


def test_adapters_are_left_out_and_said(saved: Save, palm: dict[str, Tensor]):
    palm["finetune_modules.actor.0.0.A"] = torch.zeros(8, 2)
    assert "LoRA" in "".join(read_foreign(saved(palm)).notes)


def test_an_actor_critic_is_refused(saved: Save, palm: dict[str, Tensor]):
    with pytest.raises(CheckpointError, match="ActorCritic"):
        read_foreign(saved({f"actor_palm.{name}": tensor for name, tensor in palm.items()}))


def test_another_project_than_said(data: Path):
    with pytest.raises(
        CheckpointError, match="--from nanopalm, but its tensor names are those of palm-"
    ):
        read_foreign(data / "palm-rlhf-pytorch/v0.8.0/palm", "nanopalm")
    for folder in ("PaLM-pytorch/palm", "nanoPALM/palm/ckpt.pt"):
        with pytest.raises(CheckpointError, match=r"--era 0\.2\.1: .* has no versions that differ"):
            read_foreign(data / folder, era="0.2.1")


def test_palm_pytorch_behind_its_wrapper(data: Path, saved: Save):
    plain = data / "PaLM-pytorch/palm/palm.pt"
    state = torch.load(plain, weights_only=True)
    wrapped = read_foreign(saved({f"net.{name}": tensor for name, tensor in state.items()}))
    assert wrapped.project == "palm-pytorch"
    expected = read_foreign(plain)
    assert all(torch.equal(wrapped.state[name], expected.state[name]) for name in expected.state)


def test_nanopalm_contradictions(data: Path, saved: Save):
    state = torch.load(data / "nanoPALM/palm/model_state_dict.pt", weights_only=True)
    untied = state | {"ln_vocab.weight": torch.zeros(96, 16)}
    with pytest.raises(CheckpointError, match="differ, but"):
        read_foreign(saved(untied))
    odd = state | {"decoder.blocks.0.multi_query_attn.c_attn.weight": torch.zeros(33, 16)}
    with pytest.raises(CheckpointError, match="33 attention rows"):
        read_foreign(saved(odd))
    plain = {"n_embed": 16, "n_head": 4, "vocab_size": 96, "n_layer": 2}
    with pytest.raises(CheckpointError, match="n_head is 4, but the tensors say 2"):
        read_foreign(saved({"model": state, "model_args": plain}))
    small = read_foreign(saved({"model": state, "config": {"block_size": 24}}))
    assert small.config.context == 24

"""PaLM: outputs and state dicts of the original, nn.Module methods, scopes, generation."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import PARITY, SMALL, check_state, empty, kept, small
from parity_cases import RLHF_CASES, Case
from torch import Tensor, nn

from openpalm.compat.palm_rlhf_pytorch import PaLM, top_p
from openpalm.errors import CheckpointError, SettingsError

NEWEST = [case for case in RLHF_CASES if case.version == "0.8.0"]


def name(value: object) -> str:
    return value.file if isinstance(value, Case) else str(value)


# --- what the original computes


@pytest.mark.parametrize("case", RLHF_CASES, ids=name)
def test_logits_states_and_loss_are_the_originals(case: Case):
    palm = empty(case.path.parent, era=case.version).eval()
    palm.load_state_dict(torch.load(case.path, weights_only=True))
    with torch.no_grad():
        found = {
            "logits": palm(case.array("tokens")),
            "embeds": palm(case.array("tokens"), return_only_embedding=True),
            "loss": palm(case.array("loss_tokens"), return_loss=True),
        }
        both = palm(case.array("tokens"), return_logits_with_embedding=True)
    for what, tensor in found.items():
        assert tensor.shape == case.array(what).shape
        assert (tensor - case.array(what)).abs().max() < PARITY, what
    assert torch.equal(both[0], found["logits"])
    assert torch.equal(both[1], found["embeds"])


def test_labels_that_are_ignored_can_be_chosen():
    case = NEWEST[0]
    palm = empty(case.path.parent, cross_entropy_ignore_index=-1)
    palm.load(case.path)
    loss = palm(case.array("loss_tokens"), return_loss=True)
    assert (loss - case.array("loss")).abs() > 1e-2


@pytest.mark.parametrize("case", RLHF_CASES, ids=name)
def test_the_state_dict_is_the_originals(case: Case):
    original = torch.load(case.path, weights_only=True)
    palm = empty(case.path.parent, era=case.version)
    palm.load_state_dict(original)
    check_state(palm.state_dict(), original)
    again = kept(palm)
    palm.load_state_dict(again)
    check_state(palm.state_dict(), again, rounded=("q_scale", "k_scale"))


def test_another_eras_norms_are_warned_of():
    case = RLHF_CASES[3]
    palm = empty(case.path.parent)
    with pytest.warns(UserWarning, match=r"norm scales average .* era 0\.2\.1"):
        palm.load(case.path)
    with pytest.raises(CheckpointError, match="eras are"):
        PaLM(**SMALL, era="9.9")


# --- nn.Module's ways


def test_state_dicts_are_strict_and_tell_what_is_wrong(tmp_path: Path):
    palm = small()
    state = palm.state_dict()
    less = {key: tensor for key, tensor in state.items() if key != "norm.gamma"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"norm\.gamma"'):
        palm.load_state_dict(less)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"wings"'):
        palm.load_state_dict(state | {"wings": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"norm\.gamma is \[8\], not \[16\]"):
        palm.load_state_dict(state | {"norm.gamma": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="infinite"):
        palm.load_state_dict(state | {"norm.gamma": torch.full((16,), torch.nan)})
    other = small(seed=1).state_dict()
    del other["norm.gamma"]
    result = palm.load_state_dict(other | {"wings": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["norm.gamma"], ["wings"])
    now = palm.state_dict()
    assert torch.equal(now["norm.gamma"], state["norm.gamma"])
    assert torch.equal(now["token_emb.weight"], other["token_emb.weight"])
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match=r"less\.pt.*Missing key"):
        palm.load(tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        palm.load(tmp_path / "none.pt")


class Executes:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, ("executed", "w")


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"norm.gamma": Executes()}, "evil.pt")
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        small().load("evil.pt")
    assert not Path("executed").exists()


def test_it_is_a_part_of_other_modules_as_the_original_is():
    outer = nn.ModuleDict({"lm": small(), "other": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert "lm.layers.0.fn.fused_attn_ff_proj.weight" in state
    assert not any(".model." in key for key in state)
    copied = nn.ModuleDict({"lm": small(seed=1), "other": nn.Linear(2, 2)})
    copied.load_state_dict(state)
    ids = torch.arange(10)[None]
    assert torch.equal(copied["lm"](ids), outer["lm"](ids))


def test_a_deep_copy_is_independent():
    palm = small(finetune_scopes=("a",))
    twin = copy.deepcopy(palm)
    ids = torch.arange(10)[None]
    assert torch.equal(twin(ids, finetune_scope="a"), palm(ids, finetune_scope="a"))
    before = palm(ids, finetune_scope="a")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(ids, return_loss=True).backward()
    optimizer.step()
    assert torch.equal(palm(ids, finetune_scope="a"), before)
    assert not torch.equal(twin(ids), palm(ids))
    # The scope's weights are the twin's own, not the first one's.
    assert torch.equal(twin(ids, finetune_scope="a"), twin(ids))


def test_an_optimizer_learns_a_sequence():
    palm = small(dim=32)
    seq = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    optimizer = torch.optim.Adam(palm.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        palm(seq, return_loss=True).backward()
        optimizer.step()
    answer = palm.generate(8, prompt=seq[0, :2], temperature=0)
    assert answer.tolist() == seq[0, 2:].tolist()


@pytest.mark.parametrize("given", [{"attn_dropout": 0.3}, {"ff_dropout": 0.3}])
def test_dropout_is_on_in_training_only(given: dict[str, float]):
    palm, ids = small(**given), torch.arange(12)[None]
    assert not torch.equal(palm(ids), palm(ids))
    assert torch.equal(palm.eval()(ids), palm(ids))
    palm.train().set_dropout(0.0)
    assert torch.equal(palm(ids), palm(ids))


def test_other_dtypes_keep_the_keys():
    palm = small().to(torch.bfloat16)
    state = palm.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert palm(torch.arange(5)[None]).isfinite().all()
    small(seed=1).load_state_dict(state)


# --- scopes


def test_a_scope_adds_nothing_until_it_learns_and_can_be_merged(tmp_path: Path):
    palm, ids = small(finetune_scopes=("a", "b"), lora_r=4).eval(), torch.arange(10)[None]
    assert torch.equal(palm(ids, finetune_scope="a"), palm(ids))
    with torch.no_grad():
        for factor in palm.finetune_parameters("a"):
            factor.normal_(std=0.3)
    other = palm(ids, finetune_scope="a")
    assert (other - palm(ids)).abs().max() > 0.1
    assert torch.equal(palm(ids, finetune_scope="b"), palm(ids))
    assert torch.equal(palm(ids, finetune_scope="a", disable_lora=True), palm(ids))
    assert {id(p) for p in palm.palm_parameters()}.isdisjoint(
        id(p) for p in palm.finetune_parameters("a")
    )
    torch.save(palm.state_dict(), tmp_path / "palm.pt")
    again = small(seed=1, finetune_scopes=("a", "b"), lora_r=4).eval()
    again.load(tmp_path / "palm.pt")
    assert torch.allclose(again(ids, finetune_scope="a"), other, atol=1e-5)
    palm.merge_finetune_params("a")
    assert torch.allclose(palm(ids), other, atol=1e-5)
    assert "a" not in palm.finetune_modules
    with pytest.raises(SettingsError, match="finetune scope a"):
        palm(ids, finetune_scope="a")
    with pytest.raises(SettingsError, match="already"):
        palm.add_finetune_params("b")


# --- generation


def test_shapes_and_determinism():
    palm = small()
    prompt = torch.randint(20, (2, 3, 4))
    torch.manual_seed(5)
    without, after = palm.generate(9), palm.generate(10, prompt=prompt)
    whole = palm.generate(10, prompt=prompt, return_seq_without_prompt=False)
    assert without.shape == (1, 9)
    assert after.shape == (2, 3, 6)
    assert whole.shape == (2, 3, 10)
    assert torch.equal(whole[..., :4], prompt)
    assert palm.generate(1).shape == (1, 1)
    assert palm.generate(4, prompt=[1, 2, 3]).shape == (1,)
    assert palm.generate(2, prompt=[1, 2, 3]).shape == (1,)
    torch.manual_seed(5)
    assert torch.equal(palm.generate(9), without)
    assert torch.equal(palm.generate(10, prompt=prompt), after)
    assert not torch.equal(palm.generate(10, prompt=prompt), after)
    assert palm.training
    with pytest.raises(SettingsError, match="length of 1"):
        palm.generate(0)


def test_the_random_first_token_is_of_the_result():
    """It would be missing, or every token be the first one's follower, were it dropped."""
    palm = small()
    firsts = {palm.generate(2)[0, 0].item() for _ in range(60)}
    assert len(firsts) > 12
    row = palm.generate(12, temperature=0)[0]
    best = palm(row[None])[0].argmax(dim=-1)
    assert torch.equal(row[1:], best[:-1])


def test_greedy_is_the_best_of_the_whole_forward_pass():
    palm = small()
    prompt = torch.randint(20, (4, 5))
    made = palm.generate(15, prompt=prompt, temperature=0)
    row = prompt
    for _ in range(10):
        row = torch.cat([row, palm(row)[:, -1].argmax(dim=-1, keepdim=True)], dim=-1)
    assert torch.equal(made, row[:, 5:])


def check_filter(drawn: set[int], chances: Tensor, allowed: int) -> None:
    assert drawn == set(chances.topk(allowed).indices.tolist())


def test_filters_keep_what_the_originals_thresholds_say():
    palm = small()
    chances = palm(torch.tensor([[3]]))[0, -1].softmax(dim=-1)
    prompt = torch.full((400, 1), 3)
    kept = set(palm.generate(2, prompt=prompt, temperature=3.0).flatten().tolist())
    check_filter(kept, chances, 2)  # the default: a tenth of 20
    with pytest.raises(AssertionError):
        check_filter(kept, chances, 3)
    wide = palm.generate(2, prompt=prompt, filter_logits_fn=None, temperature=50.0)
    check_filter(set(wide.flatten().tolist()), chances, 20)
    one = palm.generate(2, prompt=prompt, filter_logits_fn=top_p, filter_thres=0.999)
    check_filter(set(one.flatten().tolist()), chances, 1)
    with pytest.raises(TypeError, match="top_k or top_p"):
        palm.generate(2, filter_logits_fn=lambda thres, tokens: {})


def check_ended(rows: Tensor, eos: int, pad: int) -> None:
    for row in rows.tolist():
        after = row[row.index(eos) + 1 :] if eos in row else []
        assert after == [pad] * len(after)
    assert rows.shape[1] == max(
        (row.index(eos) + 1 if eos in row else rows.shape[1]) for row in rows.tolist()
    )


def test_rows_end_on_their_own_and_the_prompts_end_markers_do_not_count():
    palm, eos = small(sharp=1.0), 4
    prompt = torch.full((40, 3), eos)  # every prompt holds it, which ends nothing
    rows = palm.generate(12, prompt=prompt, eos_token=eos, pad_value=-5, filter_logits_fn=None)
    assert (rows == eos).any(dim=1).any()
    assert (rows[:, 0] != -5).all()
    check_ended(rows, eos, -5)
    unpadded = rows.clone()
    unpadded[rows == -5] = eos
    with pytest.raises(AssertionError):
        check_ended(unpadded, eos, -5)


def test_a_bidirectional_palm_reads_ahead_and_cannot_generate():
    palm, ids = small(causal=False), torch.arange(10)[None]
    changed = ids.clone()
    changed[0, -1] = 0
    assert not torch.allclose(palm(ids)[0, 0], palm(changed)[0, 0])
    padded = torch.cat([ids, torch.full((1, 3), -1)], dim=1)
    assert torch.allclose(palm(padded)[:, :10], palm(ids), atol=1e-5)
    with pytest.raises(SettingsError, match="bidirectional"):
        palm.generate(4)


def test_what_is_added_to_embeddings_counts():
    palm, ids = small(), torch.arange(10)[None]
    zero, some = torch.zeros(1, 1, 16), torch.randn(1, 10, 16)
    assert torch.equal(palm(ids, extra_embed=zero), palm(ids))
    assert not torch.allclose(palm(ids, extra_embed=some), palm(ids))

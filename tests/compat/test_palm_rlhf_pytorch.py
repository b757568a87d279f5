"""palm-rlhf-pytorch's classes: its README's examples, its outputs, its state dicts."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_cases import DATA, RLHF_CASES, Case
from torch import Tensor, nn

import openpalm.compat.rlhf as rlhf
from openpalm.align.experience import Estimated
from openpalm.align.ppo import estimate
from openpalm.compat.palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer, top_p
from openpalm.convert.foreign import read_foreign
from openpalm.errors import CheckpointError, DataError, OpenPalmError, SettingsError

PARITY = 1e-4
NEWEST = [case for case in RLHF_CASES if case.version == "0.8.0"]
SMALL: dict[str, Any] = {"num_tokens": 20, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2}
ARGUMENTS = (
    *("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "qk_rmsnorm", "causal"),
    *("flash_attn", "rotary_xpos_scale_base"),
)


def name(value: object) -> str:
    return value.file if isinstance(value, Case) else str(value)


def small(seed: int = 0, *, sharp: float = 30.0, **changes: Any) -> PaLM:
    """A PaLM whose next tokens differ clearly in chance, or with sharp=1 hardly."""
    torch.manual_seed(seed)
    palm = PaLM(**(SMALL | changes))
    with torch.no_grad():
        palm.model.embedding *= sharp
    return palm


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def empty(folder: Path, **more: Any) -> PaLM:
    """A PaLM of a fixture's sizes, by the original's argument names."""
    said = json.loads((folder / "config.json").read_text())
    return PaLM(**{key: said[key] for key in ARGUMENTS if key in said}, **more)


def saved(folder: Path, file: str) -> dict[str, Tensor]:
    return torch.load(folder / file, weights_only=True)


def array(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.npy"))


# --- the README's three examples: its sizes smaller, its import changed


def test_the_first_example_trains_and_generates():
    palm = PaLM(num_tokens=200, dim=32, depth=2, flash_attn=True)
    seq = torch.randint(0, 200, (1, 64))
    loss = palm(seq, return_loss=True)
    loss.backward()
    generated = palm.generate(64)
    assert generated.shape == (1, 64)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in palm.parameters())


def test_the_second_example_trains_a_reward_model():
    palm = PaLM(num_tokens=200, dim=32, depth=2, causal=False)
    reward_model = RewardModel(palm, num_binned_output=5)
    seq = torch.randint(0, 200, (1, 64))
    prompt_mask = torch.zeros(1, 64).bool()
    labels = torch.randint(0, 5, (1,))
    loss = reward_model(seq, prompt_mask=prompt_mask, labels=labels)
    loss.backward()
    reward = reward_model(seq, prompt_mask=prompt_mask)
    assert reward.shape == (1,)
    assert 0 <= reward.item() <= 4


def test_the_third_example_trains_by_reinforcement(tmp_path: Path):
    torch.save(PaLM(num_tokens=200, dim=32, depth=2).state_dict(), tmp_path / "palm.pt")
    palm = PaLM(num_tokens=200, dim=32, depth=2)
    palm.load(str(tmp_path / "palm.pt"))
    made = RewardModel(PaLM(num_tokens=200, dim=32, depth=2), num_binned_output=5)
    torch.save(made.state_dict(), tmp_path / "reward_model.pt")
    reward_model = RewardModel(palm, num_binned_output=5)
    reward_model.load(str(tmp_path / "reward_model.pt"))
    prompts = torch.randint(0, 200, (50, 5))
    trainer = RLHFTrainer(palm=palm, reward_model=reward_model, prompt_token_ids=prompts)
    trainer.train(num_episodes=2, max_timesteps=8, update_timesteps=8, max_seq_len=16)
    answer = trainer.generate(24, prompt=prompts[0], num_samples=3)
    assert answer.shape == (24,)
    assert torch.equal(answer[:5], prompts[0])


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


def check_state(
    written: dict[str, Tensor],
    known: dict[str, Tensor],
    rounded: tuple[str, ...] = ("gamma", "q_scale", "k_scale"),
):
    """rounded: what we hold shifted or scaled."""
    assert list(written) == list(known)
    for key, tensor in known.items():
        assert written[key].shape == tensor.shape, key
        assert written[key].dtype == tensor.dtype, key
        if not key.endswith(rounded):
            assert torch.equal(written[key], tensor), key
        else:
            assert torch.allclose(written[key], tensor, rtol=1e-6, atol=1e-6), key
    if "to_logits.weight" in written:
        assert written["to_logits.weight"].data_ptr() == written["token_emb.weight"].data_ptr()


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
    told = palm.load_state_dict(other | {"wings": torch.zeros(1)}, strict=False)
    assert (told.missing_keys, told.unexpected_keys) == (["norm.gamma"], ["wings"])
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
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
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


# --- the reward model


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
    assert reward.tolist() == pytest.approx(model.judge(tokens, mask, lengths), abs=1e-6)
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
    with pytest.raises(DataError, match="after one of the response"):
        model(ids, prompt_mask=ids > 3)
    with pytest.raises(DataError, match="no real token"):
        model(ids, mask=ids > 9)


def test_finetuning_changes_the_factors_and_the_head_alone():
    palm = small(dim=32)
    model = RewardModel(palm, num_binned_output=2, dropout=0.0)
    before = kept(model)
    optimizer = torch.optim.Adam(model.finetune_parameters(), lr=3e-2)
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


# --- reinforcement


def even_reward(palm: PaLM) -> RewardModel:
    """The share of even tokens in the whole sequence, exactly."""
    model = RewardModel(palm, use_lora=False)
    with torch.no_grad():
        for block in model.model.blocks:
            block.project_out.out.zero_()  # type: ignore[union-attr]
            block.project_out.down.zero_()  # type: ignore[union-attr]
        table = model.model.embedding[: palm.num_tokens]
        even = (torch.arange(palm.num_tokens) % 2 == 0).float()
        head = torch.linalg.lstsq(model.model.norm(table), even).solution
        model.model.reward_head.copy_(head[None])
    return model


def learner(**more: Any) -> RLHFTrainer:
    palm = small(num_tokens=8, depth=1)
    given: dict[str, Any] = {
        "palm": palm,
        "reward_model": even_reward(palm),
        "prompt_token_ids": [[1], [2, 3], torch.tensor([4, 5, 6])],
        "actor_lr": 1e-2,
        "critic_lr": 1e-2,
        "kl_div_loss_weight": 0.01,
        "hl_gauss_loss_kwargs": {"min_value": 0.0, "max_value": 1.0},
    }
    return RLHFTrainer(**(given | more))


def check_learns(trainer: RLHFTrainer) -> None:
    facts = trainer.train(num_episodes=10, max_timesteps=64, update_timesteps=64, max_seq_len=10)
    assert len(facts) == 10
    assert facts[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert facts[-1]["kl"] > 0.3  # from the palm as it was given, which did not move
    assert facts[-1]["reward"] > facts[0]["reward"] + 0.15


@pytest.mark.parametrize("actor_lora", [True, False])
def test_the_reward_rises(actor_lora: bool):
    trainer = learner(actor_lora=actor_lora)
    before = kept(trainer.palm.model)
    check_learns(trainer)
    same = [torch.equal(t, before[name]) for name, t in trainer.palm.model.state_dict().items()]
    assert all(same) == actor_lora
    assert all(parameter.requires_grad for parameter in trainer.palm.parameters())
    scope = "actor" if actor_lora else None
    prompt = torch.full((200, 1), 1)
    how: dict[str, Any] = {"prompt": prompt, "filter_logits_fn": None}
    after = trainer.palm.generate(10, finetune_scope=scope, **how)
    assert (after % 2 == 0).float().mean() > 0.7
    if actor_lora:
        plain = trainer.palm.generate(10, **how)
        assert (plain % 2 == 0).float().mean() < 0.7
        ids = torch.arange(8)[None]
        logits = trainer.palm(ids, finetune_scope="actor")
        trainer.palm.merge_finetune_params("actor")
        assert torch.allclose(trainer.palm(ids), logits, atol=1e-4)


def test_advantages_of_the_wrong_sign_would_show(monkeypatch: pytest.MonkeyPatch):
    def wrong(*given: Any) -> Estimated:
        advantages, returns = estimate(*given)
        return Estimated(-advantages, returns)

    monkeypatch.setattr(rlhf, "estimate", wrong)
    with pytest.raises(AssertionError):
        check_learns(learner())


def test_training_repeats_under_one_seed():
    palm = small()
    reward = RewardModel(palm)

    def facts() -> list[dict[str, float]]:
        torch.manual_seed(4)
        trainer = RLHFTrainer(
            palm=copy.deepcopy(palm), reward_model=reward, prompt_token_ids=[[1], [2]]
        )
        return trainer.train(1, 16, 8, max_seq_len=8)

    assert facts() == facts()


def test_a_critic_of_ones_own_learns_too():
    critic = small(seed=3, num_tokens=8, dim=24)
    before = kept(critic)
    trainer = learner(critic=critic, critic_lora=False, critic_num_pred_bins=0)
    check_learns(trainer)
    now = critic.state_dict()
    assert not torch.equal(
        now["layers.0.fn.attn_out.weight"], before["layers.0.fn.attn_out.weight"]
    )


class Watching(RewardModel):
    """Keeps what it was asked."""

    def judge(self, ids: Tensor, mask: Tensor, prompt_lengths: Tensor) -> list[float]:
        self.asked = getattr(self, "asked", [])
        rows = zip(ids, mask, prompt_lengths, strict=True)
        self.asked += [(row[real].tolist(), int(length)) for row, real, length in rows]
        self.padding = ids[~mask]
        return super().judge(ids, mask, prompt_lengths)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_judged_is_a_prompt_and_its_answer_to_the_end(causal: bool):
    palm = small(num_tokens=8, depth=1, sharp=1.0)
    reward = Watching(small(num_tokens=8, depth=1, causal=causal))
    prompts = [[1], [2, 3], torch.tensor([4, 5, 6])]
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts)
    facts = trainer.train(1, 90, 45, max_batch_size=7, max_seq_len=9, eos_token=0)
    assert len(reward.asked) == 90
    ended = 0
    for ids, length in reward.asked:
        prompt, answer = ids[:length], ids[length:]
        assert prompt in [[1], [2, 3], [4, 5, 6]]
        assert len(ids) <= 9
        assert 0 not in answer[:-1]
        assert answer[-1] == 0 or len(ids) == 9
        ended += answer[-1] == 0
    assert 0 < ended < 90
    assert sum(fact["ended"] for fact in facts) / 2 == pytest.approx(ended / 90)
    assert len(reward.padding)
    assert (reward.padding == (0 if causal else -1)).all()


def test_answers_are_spread_over_the_rollouts():
    trainer = learner(minibatch_size=6, epochs=2)
    steps = []
    original = rlhf.Trainer.train_step

    def counting(loop: rlhf.Trainer) -> Any:
        steps.append(loop.steps)
        return original(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.Trainer, "train_step", counting)
        facts = trainer.train(1, 25, 10, max_seq_len=6)
    assert len(facts) == 3  # of 9 answers, each twice through in steps of 6 and 3
    assert steps == [12] * 12


def test_the_best_of_the_samples_is_given():
    trainer = learner()
    made: list[list[list[int]]] = []
    answers = trainer.palm.answers

    def keeping(*given: Any, **how: Any) -> list[list[int]]:
        made.append(answers(*given, **how))
        return made[-1]

    trainer.palm.answers = keeping  # type: ignore[method-assign]
    best = trainer.generate(10, prompt=[1, 3], num_samples=6, filter_logits_fn=None)
    share = [sum(i % 2 == 0 for i in answer) / len(answer) for answer in made[0]]
    assert len(share) == 6
    assert best.tolist() == [1, 3, *made[0][share.index(max(share))]]
    assert max(share) > min(share)
    how: dict[str, Any] = {"filter_logits_fn": None, "temperature": 9.0}
    ended = trainer.generate(80, prompt=torch.tensor([1]), eos_token=4, **how)
    assert ended.tolist().index(4) == len(ended) - 1
    with pytest.raises(DataError, match="no room"):
        trainer.generate(2, prompt=[1, 3])


def test_padding_is_taken_from_the_ends_only():
    padded = torch.tensor([[0, 0, 5, 0, 6], [1, 2, 3, 0, 0], [7, 7, 7, 7, 7]])
    assert learner(prompt_token_ids=padded).prompt_token_ids == [[5, 0, 6], [1, 2, 3], [7] * 5]
    assert learner(prompt_token_ids=[[0, 1, 0]]).prompt_token_ids == [[0, 1, 0]]
    other = learner(prompt_token_ids=padded[:2], pad_value=6).prompt_token_ids
    assert other == [[0, 0, 5, 0], [1, 2, 3, 0, 0]]


def test_prompts_can_be_text(tmp_path: Path):
    def tokenizer(texts: list[str]) -> list[list[int]]:
        return [[int(letter) for letter in text] for text in texts]

    (tmp_path / "prompts.txt").write_text("12\n3\n\n456\n")
    wanted = [[1, 2], [3], [4, 5, 6]]
    none = {"prompt_token_ids": None, "tokenizer": tokenizer}
    given = learner(prompts=["12", "3", "456"], **none)
    assert given.prompt_token_ids == wanted
    read = learner(prompts_path=str(tmp_path / "prompts.txt"), **none)
    assert read.prompt_token_ids == wanted


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"prompt_token_ids": None}, SettingsError, "give one of"),
        ({"prompts": ["1"]}, SettingsError, "give one of"),
        ({"prompts": ["1"], "prompt_token_ids": None}, SettingsError, "tokenizer"),
        ({"prompt_token_ids": []}, DataError, "no prompts"),
        ({"prompt_token_ids": [[1], []]}, DataError, "prompt 1 has no token"),
        ({"prompt_token_ids": torch.zeros(2, 3).long()}, DataError, "prompt 0 has no token"),
        ({"prompt_token_ids": [[0.5]]}, DataError, "whole numbers"),
        ({"eps_clip": 1.5}, SettingsError, r"1\.5: must be"),
        ({"actor_lora_r": 99}, SettingsError, "rank"),
        ({"critic_num_pred_bins": 1}, SettingsError, "critic-bins 1: must be 0"),
        ({"hl_gauss_loss_kwargs": {"max_value": 0.0}}, SettingsError, "above min_value"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(
    given: dict[str, Any], error: type[OpenPalmError], says: str
):
    with pytest.raises(error, match=says):
        learner(**given)


def test_prompts_must_leave_room_and_be_of_the_vocabulary():
    with pytest.raises(DataError, match="prompt 2 has 3 tokens"):
        learner().train(1, 1, 1, max_seq_len=3)
    with pytest.raises(SettingsError, match="token id 8"):
        learner(prompt_token_ids=[[8]]).train(1, 1, 1, max_seq_len=3)
    with pytest.raises(SettingsError, match="1 or more"):
        learner().train(0)


@pytest.mark.parametrize(
    "given",
    [
        {"critic_pooled_values": False},
        {"actor_dropout": 0.1},
        {"critic_dropout": 0.1},
        {"accelerate_kwargs": {"cpu": True}},
        {"critic_lr": 3e-4},
        {"critic_wd": 0.1},
        {"hl_gauss_loss_kwargs": {"sigma_to_bin_ratio": 2.0}},
    ],
)
def test_arguments_that_mean_nothing_are_warned_of(given: dict[str, Any]):
    with pytest.warns(UserWarning, match=r"changes nothing") as told:
        learner(**given)
    assert any(key in str(told[0].message) for key in given)
    assert told[0].filename == __file__


def test_defaults_are_not_warned_of_and_unknown_arguments_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(critic_pooled_values=True, actor_dropout=0.0, accelerate_kwargs={})
    with pytest.raises(TypeError, match="'wings'"):
        learner(wings=2)

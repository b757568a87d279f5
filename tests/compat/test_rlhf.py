"""RLHFTrainer: learning, rewards of completions, forms of prompts, warnings."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import kept, small
from torch import Tensor

import openpalm.compat.rlhf as rlhf
from openpalm.align.rollouts.ppo import estimate
from openpalm.align.rollouts.rollout_batch import AdvantageEstimate
from openpalm.compat.palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
from openpalm.errors import (
    CheckpointError,
    DataError,
    OpenPalmError,
    SettingsError,
    StorageError,
)


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
    def wrong(*given: Any) -> AdvantageEstimate:
        advantages, returns = estimate(*given)
        return AdvantageEstimate(-advantages, returns)

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


ACTOR_CRITIC = {
    "actor_palm.token_emb.weight": [20, 16],
    "actor_palm.layers.1.fn.ff_out.2.weight": [16, 64],
    "actor_palm.finetune_modules.actor.0.3.B": [8, 16],
    "critic.token_emb.weight": [20, 16],
    "critic.finetune_modules.critic.1.2.A": [16, 8],
    "value_head.weight": [6, 16],
    "value_head.bias": [6],
}
"""Some of the names and shapes that palm-rlhf-pytorch 0.8.0 writes for these sizes."""


def saving(**more: Any) -> RLHFTrainer:
    palm = small(seed=more.pop("seed", 0), sharp=1.0)
    return RLHFTrainer(palm=palm, reward_model=RewardModel(palm), prompt_token_ids=[[1]], **more)


@pytest.mark.parametrize("how", [{}, {"actor_lora": False, "critic_lora": False}])
def test_a_saved_trainer_is_loaded(tmp_path: Path, how: dict[str, Any]):
    trainer = saving(**how)
    trainer.train(1, 8, 8, max_seq_len=6)
    trainer.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if not how:
        assert {name: list(state[name].shape) for name in ACTOR_CRITIC} == ACTOR_CRITIC
    other = saving(seed=1, **how)
    prompt = {"prompt": torch.arange(6), "num_samples": 1, "filter_logits_fn": None}
    other.load(tmp_path / "checkpoint.pt")
    ids = torch.arange(12)[None]
    scope = None if how else "actor"
    assert torch.equal(
        other.palm(ids, finetune_scope=scope), trainer.palm(ids, finetune_scope=scope)
    )
    trunks = [t.actor_critic.critic.trunk for t in (trainer, other)]
    assert torch.equal(trunks[0].hidden(ids), trunks[1].hidden(ids))
    heads = [t.actor_critic.critic.read.weight for t in (trainer, other)]
    assert torch.equal(*heads)
    assert heads[0].abs().max() > 0, "training moved it from zero"
    given = []
    for one in (trainer, other):
        torch.manual_seed(3)
        given.append(one.generate(10, **prompt))
    assert torch.equal(*given)


def test_the_file_of_another_trainer_changes_nothing(tmp_path: Path):
    saving(actor_lora_r=4).save(tmp_path / "checkpoint.pt")
    trainer = saving()
    before = kept(trainer.palm)
    with pytest.raises(CheckpointError, match=r"actor\.0\.0\.A is \[16, 4\], here \[16, 8\]"):
        trainer.load(tmp_path / "checkpoint.pt")
    saving(critic_lora=False).save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"finetune_modules\.critic.* is missing"):
        trainer.load(tmp_path / "checkpoint.pt")
    assert all(torch.equal(t, before[name]) for name, t in trainer.palm.state_dict().items())


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trainer = saving()
    before = kept(trainer.palm)
    torch.save({"actor_palm.token_emb.weight": Malicious()}, "checkpoint.pt")
    with pytest.raises(CheckpointError):
        trainer.load()
    assert not Path("canary").exists()
    trainer.save()
    state = torch.load("checkpoint.pt", weights_only=True)
    state["value_head.bias"][0] = float("nan")
    torch.save(state, "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"value_head\.bias holds numbers"):
        trainer.load()
    assert all(torch.equal(t, before[name]) for name, t in trainer.palm.state_dict().items())


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be saved"):
        saving().save(tmp_path / "file" / "checkpoint.pt")


class Watching(RewardModel):
    """Keeps what it was asked."""

    def rewards(self, ids: Tensor, mask: Tensor, prompt_lengths: Tensor) -> list[float]:
        self.asked = getattr(self, "asked", [])
        rows = zip(ids, mask, prompt_lengths, strict=True)
        self.asked += [(row[real].tolist(), int(length)) for row, real, length in rows]
        self.padding = ids[~mask]
        return super().rewards(ids, mask, prompt_lengths)


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
    answers = trainer.palm.completions

    def keeping(*given: Any, **how: Any) -> list[list[int]]:
        made.append(answers(*given, **how))
        return made[-1]

    trainer.palm.completions = keeping  # type: ignore[method-assign]
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
        ({"critic_num_pred_bins": 1}, SettingsError, "value-bins 1: must be 0"),
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
    with pytest.warns(UserWarning, match=r"changes nothing") as caught:
        learner(**given)
    assert any(key in str(caught[0].message) for key in given)
    assert caught[0].filename == __file__


def test_defaults_are_not_warned_of_and_unknown_arguments_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(critic_pooled_values=True, actor_dropout=0.0, accelerate_kwargs={})
    with pytest.raises(TypeError, match="'wings'"):
        learner(wings=2)

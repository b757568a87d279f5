"""The three examples of palm-rlhf-pytorch's README with smaller sizes and our import."""

from pathlib import Path

import torch

from openpalm.compat.palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer


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

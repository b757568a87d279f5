"""Speed of DPO, GRPO and PPO compared with TRL, palm-rlhf-pytorch and a bare PyTorch loop.

    python benchmarks/align.py [--rows dpo,grpo,ppo] [--rounds 5] [--threads 2] [--json]
                               [--peers PATH/python]

About 4 million parameters (the palm-5m shape with a vocabulary of 512, for the Llama of TRL and for
palm-rlhf-pytorch the nearest of the same width and depth), prompts of 64 tokens and answers of 64,
batches of 8, float32, AdamW, no gradient checkpointing. Every contender is a process of its own
that waits for its turn. A figure is the median over the rounds; in a round each contender takes a
few optimizer steps, data and bookkeeping included. The peers run in the interpreter that --peers
names, in which they are installed; what cannot be imported there is left out and named.

    dpo     pairs a second; the reference's log-probabilities are computed before
    grpo    completions a second: 8 of one prompt, sampled, rewarded and learnt from
    ppo     episodes a second: sampled, rewarded by a reward model, learnt from in one epoch
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

VOCAB, PROMPT, ANSWER, BATCH, DATA = 512, 64, 64, 8, 256
DIM, DEPTH, HEADS, HEAD_DIM, FF_DIM = 256, 4, 4, 64, 1024
LEARNING_RATE = 1e-5
FOREVER = 10**6


class Turns:
    """A contender's side: it reports every step, and waits while the others take their turn."""

    def __init__(self, steps: int):
        self._steps, self._done, self._start = steps, 0, 0.0
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the peers print is no answer

    def tell(self, value: object) -> None:
        print(json.dumps(value), file=self._out, flush=True)

    def step(self) -> None:
        """One optimizer step is done. The first turn is building and one step, and warms up."""
        self._done += 1
        if self._done % self._steps == 1 % self._steps:
            self.tell(time.perf_counter() - self._start)
            if not sys.stdin.readline():
                os._exit(0)
            self._start = time.perf_counter()


def random_ids(rows: int, tokens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (rows, tokens), generator=generator).tolist()


# --- ours


def our_model() -> Any:
    from openpalm.model.config import preset
    from openpalm.model.transformer import Transformer, initialise

    config = replace(preset("palm-5m").config, vocab_size=VOCAB)
    assert (config.dim, config.depth, config.ff_dim) == (DIM, DEPTH, FF_DIM)
    model = Transformer(config)
    initialise(model, seed=0)
    return model


def our_pairs() -> Any:
    from openpalm.align.pairs.examples import PreferenceExample
    from openpalm.data.text.conversation import Example

    prompts, chosen, rejected = (
        random_ids(DATA, n, i) for i, n in enumerate((PROMPT, ANSWER, ANSWER))
    )
    mask = [False] * PROMPT + [True] * ANSWER
    return [
        PreferenceExample((Example(p + c, mask), Example(p + r, mask)))
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]


def our_trainer(model: Any, objective: Any, loader: Any, dtype: torch.dtype = torch.float32) -> Any:
    from openpalm.train.config import OptimSettings
    from openpalm.train.optimization.parameter_groups import Optimizer
    from openpalm.train.trainer import Trainer

    optimizer = Optimizer(model, OptimSettings(), LEARNING_RATE)
    return Trainer(model, objective, optimizer, loader, steps=FOREVER, dtype=dtype)


def our_dpo(turns: Turns) -> None:
    from openpalm.align.config import DpoSettings
    from openpalm.align.pairs.dpo import PairObjective
    from openpalm.align.pairs.examples import collate_shared, preference_loader, with_reference

    model = our_model()
    settings = DpoSettings(data=Path("-"), out=Path("-"), init="-", steps=1)
    pairs = with_reference(model, our_pairs())
    loader = preference_loader(pairs, rows=BATCH, seed=0, collate=collate_shared)
    trainer = our_trainer(model, PairObjective(settings), loader)
    while True:
        trainer.train_step()
        turns.step()


def bare_dpo(turns: Turns) -> None:
    """What one writes in PyTorch in an afternoon: our model, two rows a pair, logits everywhere."""
    model = our_model()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    prompts, chosen, rejected = (
        torch.tensor(random_ids(DATA, n, i)) for i, n in enumerate((PROMPT, ANSWER, ANSWER))
    )

    def answers(index: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the chosen, then of the rejected answers."""
        rows = [torch.cat([prompts[index], a[index]], 1) for a in (chosen, rejected)]
        ids = torch.cat(rows)
        logs = model.logits(ids[:, :-1]).log_softmax(-1)
        return logs.gather(-1, ids[:, 1:, None])[:, PROMPT - 1 :, 0].sum(-1)

    model.eval()
    with torch.no_grad():
        columns = [answers(torch.arange(i, i + BATCH)) for i in range(0, DATA, BATCH)]
    reference = torch.stack([torch.cat([c.chunk(2)[i] for c in columns]) for i in (0, 1)])
    model.train()
    while True:
        for index in torch.randperm(DATA).split(BATCH):
            margin = answers(index) - reference[:, index].flatten()
            better, worse = margin.chunk(2)
            loss = -F.logsigmoid(0.1 * (better - worse)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            turns.step()


def our_rollouts(turns: Turns, model: Any, how: Any, objective: Any, rules: Any) -> None:
    """A rollout of a batch and one step on it, for ever; `rules` are its reward and estimate."""
    from openpalm.align.rollouts.rollout import RolloutLoader
    from openpalm.align.rollouts.sampler import Sampler

    sampler = Sampler(model, random_ids(DATA, PROMPT, 0), frozenset(), how, slots=BATCH)
    reward, estimate, reference = rules
    dtype = getattr(torch, how.rollout_dtype)
    loader = RolloutLoader(sampler, reward, estimate, reference, rows=BATCH, dtype=dtype)
    trainer = our_trainer(model, objective, loader, dtype)
    while True:
        trainer.train_step()
        turns.step()


def our_grpo(turns: Turns, weights: str = "float32") -> None:
    from openpalm.align.config import GrpoSettings
    from openpalm.align.rollouts.grpo import GroupObjective, estimate

    paths = {"data": Path("-"), "out": Path("-"), "init": "-"}
    how = GrpoSettings(
        **paths,
        steps=1,
        prompts_per_rollout=1,
        num_completions=BATCH,
        max_new_tokens=ANSWER,
        advantage="grpo",
        kl_coef=0.0,
    )

    def reward(answers: Any) -> list[float]:
        assert all(len(answer.ids) == ANSWER for answer in answers)
        return [even(torch.tensor(answer.ids)).item() for answer in answers]

    our_rollouts(turns, our_model(), how, GroupObjective(how), (reward, estimate, None))


def our_ppo(turns: Turns, weights: str = "float32", critic: str = "separate") -> None:
    from openpalm.align.config import PpoSettings
    from openpalm.align.logprobs import token_log_probs
    from openpalm.align.pairs.examples import PreferenceExample
    from openpalm.align.pairs.reward_model import collate
    from openpalm.align.rollouts.ppo import PpoObjective, estimate
    from openpalm.align.rollouts.rollout_batch import to_example
    from openpalm.model.config import RewardConfig
    from openpalm.model.critic import ActorCritic
    from openpalm.model.reward import RewardModel, initialise_heads
    from openpalm.model.transformer import initialise

    paths = {"data": Path("-"), "out": Path("-"), "init": "-"}
    sizes = {"prompts_per_rollout": BATCH, "max_new_tokens": ANSWER, "epochs_per_rollout": 1}
    how = PpoSettings(**paths, **sizes, steps=1, critic=critic, rollout_dtype=weights)
    reference = our_model().requires_grad_(False)
    model = ActorCritic(reference.config, how.critic)
    model.load_state_dict(reference.state_dict(), strict=False)
    model.reset_critic()
    judge = RewardModel(reference.config, RewardConfig("binned", (1.0, 2.0, 3.0, 4.0, 5.0)))
    initialise(judge, seed=1)
    initialise_heads(judge, seed=1)

    @torch.no_grad()
    def reward(answers: Any) -> list[float]:
        batch = collate([PreferenceExample((to_example(answer),)) for answer in answers])
        return judge.value(batch.ids, batch.mask, batch.prompt_lengths).tolist()

    rules = (reward, estimate, partial(token_log_probs, reference))
    our_rollouts(turns, model, how, PpoObjective(how), rules)


def even(ids: torch.Tensor) -> torch.Tensor:
    """The reward of GRPO's rows: the share of even ids, [rows]."""
    return (ids % 2 == 0).float().mean(-1)


def bare_grpo(turns: Turns) -> None:
    """Sampling that computes the whole sequence for every token, then one step on the group."""
    model = our_model()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    prompts = torch.tensor(random_ids(DATA, PROMPT, 0))
    while True:
        for prompt in prompts:
            ids = prompt.expand(BATCH, -1)
            model.eval()
            with torch.no_grad():
                for _ in range(ANSWER):
                    chances = model.logits(ids)[:, -1].softmax(-1)
                    ids = torch.cat([ids, chances.multinomial(1)], dim=1)
            model.train()
            rewards = even(ids[:, PROMPT:])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            logs = model.logits(ids[:, :-1]).log_softmax(-1)
            logs = logs.gather(-1, ids[:, 1:, None])[:, PROMPT - 1 :, 0]
            loss = -(advantages[:, None] * (logs - logs.detach()).exp()).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            turns.step()


# --- TRL


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=FF_DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def word_tokenizer() -> Any:
    """Every id is a word, so that texts have exactly the tokens asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    words |= {f"w{i}": i for i in range(len(words), VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def texts(rows: int, tokens: int, seed: int) -> list[str]:
    return [" ".join(f"w{i}" for i in ids) for ids in random_ids(rows, tokens, seed)]


def report_steps(turns: Turns) -> Any:
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            turns.step()

    return Told()


TRL = {
    "learning_rate": LEARNING_RATE,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "max_steps": FOREVER,
    "logging_steps": FOREVER,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def trl_dpo(turns: Turns) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    answers = [texts(DATA, ANSWER - 1, seed) for seed in (1, 2)]  # its end marker is the 64th
    rows = {
        "prompt": texts(DATA, PROMPT, 0),
        "chosen": [f" {text} </s>" for text in answers[0]],
        "rejected": [f" {text} </s>" for text in answers[1]],
    }
    with tempfile.TemporaryDirectory() as folder:
        how = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=BATCH,
            **TRL,
        )
        trainer = DPOTrainer(
            model=llama(),
            args=how,
            train_dataset=Dataset.from_dict(rows),
            processing_class=word_tokenizer(),
            callbacks=[report_steps(turns)],
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].shape == (2 * BATCH, PROMPT + ANSWER), batch["input_ids"].shape
        trainer.train()


def trl_grpo(turns: Turns, **how_else: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: list[list[int]], **more: Any) -> list[float]:
        assert all(len(ids) == ANSWER for ids in completion_ids)
        return [even(torch.tensor(ids)).item() for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        how = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_generations=BATCH,
            max_completion_length=ANSWER,
            generation_kwargs={"min_new_tokens": ANSWER},
            beta=0.0,
            **(TRL | how_else),
        )
        trainer = GRPOTrainer(
            model=llama(),
            reward_funcs=reward,
            args=how,
            train_dataset=Dataset.from_dict({"prompt": texts(DATA, PROMPT, 0)}),
            processing_class=word_tokenizer(),
            callbacks=[report_steps(turns)],
        )
        trainer.train()


# --- palm-rlhf-pytorch


def palm_rlhf_ppo(turns: Turns) -> None:
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    torch.manual_seed(0)
    sizes = {"num_tokens": VOCAB, "dim": DIM, "depth": DEPTH, "heads": HEADS, "dim_head": HEAD_DIM}
    trainer = RLHFTrainer(
        palm=PaLM(**sizes),
        reward_model=RewardModel(PaLM(**sizes), num_binned_output=5),
        prompt_token_ids=torch.tensor(random_ids(DATA, PROMPT, 0)),
        actor_lr=LEARNING_RATE,
        critic_lr=LEARNING_RATE,
        actor_lora=False,
        critic_lora=False,
        minibatch_size=BATCH,
    )
    learn = trainer.learn

    def learn_and_tell(memories: Any) -> None:
        learn(memories)
        turns.step()

    trainer.learn = learn_and_tell
    trainer.train(
        num_episodes=FOREVER,
        max_timesteps=BATCH,
        update_timesteps=BATCH,
        max_seq_len=PROMPT + ANSWER,  # of prompt and answer together
    )


# --- who takes turns with whom


@dataclass(frozen=True)
class Row:
    """What is compared: `steps` optimizer steps a turn, the first contender against the others."""

    unit: str
    steps: int
    contenders: dict[str, Callable[[Turns], None]]


ROWS = {
    "dpo": Row(
        "pairs",
        8,
        {"OpenPaLM": our_dpo, "bare PyTorch, two rows a pair": bare_dpo, "TRL DPOTrainer": trl_dpo},
    ),
    "grpo": Row(
        "completions",
        2,
        {
            "OpenPaLM": our_grpo,
            "bare PyTorch, no cache": bare_grpo,
            "TRL GRPOTrainer": trl_grpo,
            "OpenPaLM, bfloat16": partial(our_grpo, weights="bfloat16"),
            "TRL GRPOTrainer, bf16": partial(trl_grpo, bf16=True),
        },
    ),
    "ppo": Row(
        "episodes",
        1,
        {
            "OpenPaLM": our_ppo,
            "palm-rlhf-pytorch RLHFTrainer": palm_rlhf_ppo,
            "OpenPaLM, bfloat16": partial(our_ppo, weights="bfloat16"),
            "OpenPaLM, bfloat16, one trunk": partial(our_ppo, weights="bfloat16", critic="shared"),
        },
    ),
}
PEERS = ("TRL", "palm-rlhf-pytorch")


def contend(row: str, name: str) -> None:
    """The process of one contender."""
    warnings.filterwarnings("ignore")
    turns = Turns(ROWS[row].steps)
    try:
        ROWS[row].contenders[name](turns)
    except (ImportError, NotImplementedError) as error:
        turns.tell(f"left out, {error}")


@contextmanager
def contender(row: str, name: str, python: str, threads: int) -> Iterator[subprocess.Popen[str]]:
    words = [python, __file__, "--contender", row, name]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if python == sys.executable:
        variables["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, text=True, env=variables, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def seconds_of(process: subprocess.Popen[str], name: str) -> float | None:
    """Of the turn that ends next; None where the contender cannot take part."""
    assert process.stdout is not None
    line = process.stdout.readline()
    result = json.loads(line) if line else "left out, it ended; run it with --contender to see why"
    if isinstance(result, str):
        print(f"{name}: {result}", file=sys.stderr)
        return None
    return result


def measure(row: str, rounds: int, peers: str, threads: int) -> list[dict[str, Any]]:
    """Each contender's rates in items a second, and how many times slower it is than the first."""
    what, rates = ROWS[row], {}
    with ExitStack() as stack:
        running = {}
        for name in what.contenders:  # one builds after the other
            python = peers if name.startswith(PEERS) else sys.executable
            process = stack.enter_context(contender(row, name, python, threads))
            if seconds_of(process, name) is not None:
                running[name], rates[name] = process, []
        for turn in range(rounds):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                if (seconds := seconds_of(process, name)) is not None:
                    rates[name].append(what.steps * BATCH / seconds)
            print(f"{row} round {turn + 1} of {rounds}", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in rates.items() if found}
    first = medians.get(next(iter(what.contenders)))
    return [
        {
            "row": row,
            "who": name,
            "unit": f"{what.unit}/s",
            "median": median,
            "least": min(rates[name]),
            "most": max(rates[name]),
            "first_against_it": first / median if first else None,
        }
        for name, median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="dpo,grpo,ppo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    how = parser.parse_args()
    if how.contender:
        contend(*how.contender)
        return
    before = os.getloadavg()[0]
    common = (how.rounds, how.peers, how.threads)
    found = [line for row in how.rows.split(",") for line in measure(row, *common)]
    if how.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{how.threads} threads, load {before:.2f} before, medians of {how.rounds} rounds")
    print("| row | who | median | least to most | OpenPaLM against it |\n|---|---|---|---|---|")
    for line in found:
        ratio = f"{line['first_against_it']:.2f}" if line["first_against_it"] else ""
        print(
            f"| {line['row']} | {line['who']} | {line['median']:.1f} {line['unit']} "
            f"| {line['least']:.1f} to {line['most']:.1f} | {ratio} |"
        )


if __name__ == "__main__":
    main()

"""What gpu.py checks before it measures anything: a GPU computes what a CPU computes.

Every check yields rows with `difference` and `allowed`; `ok` is whether the first is within the
second. Sizes are small, so that a check takes seconds.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
from gpu_bench import Bench, Item
from peers_train import OpenPalm, Rules
from torch import Tensor
from train_common import Row, random_batch

from openpalm.base.settings import build
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.batches.loader import Batch, token_loader
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.config import ModelConfig, preset
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import TrainSettings
from openpalm.train.run import run_training
from openpalm.train.spec import TrainSpec

SMALL = replace(preset("palm-tiny").config, head_dim=64, context=128)
STEPS, SAVED_AT = 20, 10
RESUMED = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}
"""Allowed difference of the weights of two equal runs, by dtype: sums on a GPU may change order."""


def agreement(bench: Bench) -> Iterator[Item]:
    """The checks, those that need less of torch first."""
    device = bench.device
    yield Item("logits", 3, lambda: logits(device))
    yield Item("engine", 3, lambda: engine(device))
    yield Item("trainer and engine", 3, lambda: trainer_and_engine(device))
    yield Item("CUDA graphs", 0, graphs_of_engine)
    yield Item("optimizers", 8, lambda: optimizers(device))
    yield Item("moments in the CPU's memory", 4, lambda: offloaded(device))
    yield Item("float16", 4, lambda: float16(device))
    yield Item("gradients", 25, lambda: gradients(device, bench.backend))
    for dtype in RESUMED:
        yield Item(f"resumed, {dtype}", 8, lambda dtype=dtype: resumed(device, dtype))


def checked(check: str, difference: float, allowed: float, **more: Any) -> Row:
    ok = difference <= allowed
    return {"check": check, "difference": difference, "allowed": allowed, "ok": ok, **more}


def distance(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||"""
    ours, reference = (x.detach().double().cpu() for x in (ours, reference))
    return float((ours - reference).norm() / reference.norm())


def small_model(device: torch.device, config: ModelConfig = SMALL) -> Transformer:
    model = Transformer(config).to(device)
    initialise(model, seed=0)
    return model.eval()


def logits(device: torch.device) -> Iterator[Row]:
    """On the device and on the CPU, for each kind of key/value heads."""
    ids = torch.randint(0, SMALL.vocab_size, (2, 100))
    for kv_heads in (1, 2, 4):
        config = replace(SMALL, kv_heads=kv_heads)
        with torch.inference_mode():
            reference = small_model(torch.device("cpu"), config).logits(ids)
            model = small_model(device, config)
            found = model.logits(ids.to(device))
            with torch.autocast(device.type, torch.bfloat16):
                rounded = model.logits(ids.to(device))
        name = f"logits as on the CPU, {kv_heads} of {SMALL.heads} key/value heads"
        yield checked(f"{name}, float32", distance(found, reference), 1e-5)
        yield checked(f"{name}, bfloat16", distance(rounded, reference), 2e-2)


def engine(device: torch.device) -> Iterator[Row]:
    """Greedy tokens and their log-probabilities are those of the model without a cache."""
    model = small_model(device)
    prompts = [[1, 2, 3, 4, 5], list(range(40)), [7] * 20]
    requests = [Request(prompt, 24, Sampling(temperature=0)) for prompt in prompts]
    made: list[list[tuple[int, float]]] = [[] for _ in prompts]
    for token in Engine(model).generate(requests):
        made[token.request].append((token.id, token.log_prob))
    worst, other = 0.0, 0
    for prompt, tokens in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt + [token for token, _ in tokens]], device=device)
        with torch.inference_mode():
            expected = model.logits(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
        other += sum(a != b for a, (b, _) in zip(expected.argmax(-1).tolist(), tokens, strict=True))
        chosen = expected.gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()
        worst = max(worst, *(abs(a - b) for a, (_, b) in zip(chosen, tokens, strict=True)))
    yield checked("engine's log-probabilities as the model's, float32", worst, 1e-4)
    yield checked("engine's greedy tokens that differ from the model's", other, 0)


def trainer_and_engine(device: torch.device) -> Iterator[Row]:
    """The trainer's loss is the mean of the engine's log-probabilities of the same tokens."""
    torch.manual_seed(0)
    batch = random_batch(SMALL.vocab_size, 4, 100)
    sequences = torch.cat([batch.inputs, batch.targets[:, -1:]], 1).tolist()
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-3)):
        trainer = OpenPalm(Rules(SMALL, dtype, device))._trainer
        loss, _, _ = trainer.forward_backward([batch])
        name = str(dtype).removeprefix("torch.")
        scores = Engine(trainer.model.eval(), weights=name).score(sequences)  # type: ignore[arg-type]
        mean = -float(torch.cat(scores).mean())
        difference = abs(loss - mean) / mean
        yield checked(f"engine's loss as the trainer's, {name}", difference, allowed, loss=loss)


def graphs_of_engine() -> Iterator[Row]:
    missing = "the engine captures none: the host launches the kernels of every decoding step"
    yield {"check": "decoding in a CUDA graph", "left_out": missing}


def optimizers(device: torch.device) -> Iterator[Row]:
    """Weights after five float32 steps, on the device and on the CPU."""
    torch.manual_seed(0)
    batches = [random_batch(SMALL.vocab_size, 4, 64) for _ in range(5)]
    for name in ("adamw", "muon", "stable-adamw", "lion", "adafactor"):
        places = (torch.device("cpu"), device)
        optim = {"name": name}
        weights = [after_steps(p, torch.float32, batches, optim=optim)[0] for p in places]
        # The sign of a gradient near zero is noise to Lion and in the first steps of Adam's kind;
        # Muon multiplies in bfloat16.
        allowed = 2e-3 if name in ("adamw", "stable-adamw") else 1e-2
        yield checked(f"five steps of {name} as on the CPU", distance(*reversed(weights)), allowed)


def after_steps(
    device: torch.device, dtype: torch.dtype, batches: list[Batch], **settings: Any
) -> tuple[Tensor, OpenPalm]:
    """All weights after a step on each of the batches, and who took them."""
    who = OpenPalm(Rules(SMALL, dtype, device, steps=len(batches)), **settings)
    for batch in batches:
        who.step(batch)
    return whole(who._trainer.model), who


def offloaded(device: torch.device) -> Iterator[Row]:
    """--memory.offload-moments: the same numbers; on a CPU the moments are there anyway."""
    torch.manual_seed(0)
    batches = [random_batch(SMALL.vocab_size, 4, 64) for _ in range(5)]
    for name in ("adamw", "muon"):
        optim = {"name": name}
        here, _ = after_steps(device, torch.float32, batches, optim=optim)
        memory = {"offload_moments": True}
        away, who = after_steps(device, torch.float32, batches, optim=optim, memory=memory)
        moments = who._trainer.optimizer.state_tensors().values()
        places = sorted({moment.device.type for moment in moments})
        yield checked(
            f"five steps of {name} with its moments on the CPU",
            distance(away, here),
            1e-5,
            same_bits=torch.equal(away, here),
            moments_on=",".join(places),
        )


def float16(device: torch.device) -> Iterator[Row]:
    """--dtype float16, with loss scaling, against float32."""
    torch.manual_seed(0)
    batches = [random_batch(SMALL.vocab_size, 4, 64) for _ in range(5)]
    exact, _ = after_steps(device, torch.float32, batches)
    half, who = after_steps(device, torch.float16, batches)
    scale = who._trainer.loss_scale
    assert scale is not None
    begun = whole(small_model(device))
    # Of the update, as the weights hardly move in five steps; Adam's first ones follow signs.
    difference = distance(half - begun, exact - begun)
    yield checked("update of five steps in float16", difference, 0.1, loss_scale=scale.scale)


def gradients(device: torch.device, backend: str) -> Iterator[Row]:
    """Of one batch, against the CPU's in float32; blocks as they are, and compiled."""
    torch.manual_seed(0)
    batch = random_batch(SMALL.vocab_size, 4, 128)
    reference = gradient(OpenPalm(Rules(SMALL, torch.float32, torch.device("cpu"))), batch)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        name = str(dtype).removeprefix("torch.")
        who = OpenPalm(Rules(SMALL, dtype, device))
        plain = gradient(who, batch)
        yield checked(f"gradient as on the CPU, {name}", distance(plain, reference), allowed)
        graphs = compile_blocks(who, backend)
        difference = distance(gradient(who, batch), reference)
        yield checked(f"gradient of compiled blocks, {name}", difference, allowed, **graphs())


def gradient(who: OpenPalm, batch: Batch) -> Tensor:
    who._trainer.model.train()
    who._trainer.optimizer.zero_grad()
    who._trainer.forward_backward([batch])
    parameters = who._trainer.model.parameters()
    return torch.cat([p.grad.cpu().flatten() for p in parameters if p.grad is not None])


def compile_blocks(who: OpenPalm, backend: str) -> Callable[[], Row]:
    """Compiles as --compile does; returns a function that counts graphs and graph breaks."""
    torch._dynamo.reset()  # else the shapes of earlier models count towards its limit
    torch._dynamo.utils.counters.clear()
    for block in who._trainer.model.blocks:
        block.compile(backend=backend)

    def graphs() -> Row:
        counters = torch._dynamo.utils.counters
        breaks = sum(counters["graph_break"].values())
        return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}

    return graphs


def resumed(device: torch.device, dtype: str) -> Iterator[Row]:
    """A run of 20 steps against one that was resumed from its step 10, and against a repetition."""
    if dtype == "float16" and device.type == "cpu":
        yield {"check": f"a resumed run, {dtype}", "left_out": "a CPU only emulates it"}
        return
    with tempfile.TemporaryDirectory() as folder:
        whole_run, repeated, cut = (Path(folder) / name for name in ("whole", "again", "cut"))
        ends = [trained(whole_run, device, dtype), trained(repeated, device, dtype)]
        shutil.copytree(whole_run, cut)
        shutil.rmtree(cut / "checkpoints" / checkpoint.step_name(STEPS))
        ends.append(trained(cut, device, dtype))
        losses = [step_losses(out) for out in (whole_run, repeated, cut)]
    first, *others = ends
    for name, end, found in zip(("repeated", "resumed"), others, losses[1:], strict=True):
        yield checked(
            f"weights of a {name} run, {dtype}",
            distance(end, first),
            RESUMED[dtype],
            same_bits=torch.equal(end, first) and found == losses[0],
            last_loss=found[-1],
        )


def trained(out: Path, device: torch.device, dtype: str) -> Tensor:
    """All weights at the end of the run in `out`, as its last checkpoint has them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SMALL.vocab_size, 20_000).astype(np.uint16)
    spec = TrainSpec(
        config=SMALL,
        fill=partial(initialise, seed=0),
        make_loader=lambda shape, *_: token_loader(
            tokens, sequence_length=shape.sequence_length, rows=shape.rows, seed=0
        ),
        sequences_per_epoch=len(tokens) // SMALL.context,
        learning_rate=1e-3,
    )
    values = {"data": "-", "out": out, "model": "-", "steps": STEPS, "save_every": SAVED_AT}
    values |= {"device": device.type, "dtype": dtype, "keep_checkpoints": 0, "eval_every": STEPS}
    values |= {"batch_tokens": 4 * SMALL.context}
    outcome = run_training(build(TrainSettings, values), spec)
    return whole(checkpoint.load(outcome.checkpoint, device=device.type))


def whole(model: Transformer) -> Tensor:
    """Every weight of the model in one vector."""
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


def step_losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]

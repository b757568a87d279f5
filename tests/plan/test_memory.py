"""The plan's bytes against those of real parameters, moments and training steps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors

from openpalm.data.batches.loader import Batch
from openpalm.model import attention, cross_entropy, lora
from openpalm.model.config import PRESETS, LoraConfig, ModelConfig
from openpalm.model.recompute import recompute
from openpalm.model.transformer import Transformer, initialise
from openpalm.plan import activations, memory
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import Memory, parameters, stages, step_memory
from openpalm.plan.training import Training
from openpalm.train.objective import NextToken
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimizer_settings import OptimSettings

PALM = ModelConfig(vocab_size=1000, dim=96, depth=3, heads=3, head_dim=32, ff_dim=384, context=128)
GPTJ = ModelConfig(
    vocab_size=900,
    dim=96,
    depth=3,
    heads=3,
    head_dim=32,
    ff_dim=384,
    kv_heads=3,
    context=128,
    feedforward="gelu",
    bias=True,
    tied=False,
    rotary="interleaved",
    rotary_dims=16,
)
NARROW_VOCABULARY = replace(PALM, vocab_size=250)
ADAPTER = LoraConfig(4, 8.0, tuple(PALM.matrices))
ONE = Layout()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name: str):
    config = PRESETS[name].config
    with torch.device("meta"):
        model = Transformer(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    (stage,) = stages(config, ONE)
    assert stage.parameters == parameters(config)


def measured(training: Training) -> tuple[int, int, int]:
    """Bytes of a second step at its peak; of its weights with gradients; of the moments."""
    torch.manual_seed(0)
    model, config = Transformer(training.config), training.config
    initialise(model, seed=0)
    if training.lora is not None:
        lora.attach(model, training.lora, seed=0)
    recompute(model.train(), training.recompute)
    optimizer = Optimizer(model, OptimSettings(name=training.optimizer), 1e-3)
    dtype = getattr(torch, training.dtype)
    live = LiveTensors()
    for parameter in model.parameters():
        live.add(parameter)
    state = 0
    for _ in range(2):
        live.peak = 0
        for _ in range(training.accumulation):
            ids = torch.randint(config.vocab_size, (training.rows, training.context + 1))
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            with live:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss, _ = NextToken(chunk=training.loss_chunk).loss(model, batch)
                loss.backward()
                del loss
        state = sum(x.nbytes for p in model.parameters() for x in (p, p.grad) if x is not None)
        with live:
            optimizer.clip()
            optimizer.step(1.0)
    moments = [x.nbytes for x in optimizer.state_tensors().values() if x.dim()]
    return live.peak, state, sum(moments)


def training_of(config: ModelConfig, dtype: str, **more: Any) -> Training:
    how = {"rows": 4, "accumulation": 2, "dtype": dtype} | more
    return replace(Training(config, config.context, 1), **how)


RUNS = {
    "float32": training_of(PALM, "float32"),
    "float32, selective": training_of(PALM, "float32", recompute="selective"),
    "float32, full": training_of(NARROW_VOCABULARY, "float32", recompute="full"),
    "one microbatch": training_of(PALM, "float32", accumulation=1),
    "one microbatch, full": training_of(PALM, "float32", accumulation=1, recompute="full"),
    "small chunks": training_of(PALM, "float32", loss_chunk=50),
    "bfloat16": training_of(PALM, "bfloat16"),
    "bfloat16, selective": training_of(PALM, "bfloat16", recompute="selective"),
    "bfloat16, full": training_of(NARROW_VOCABULARY, "bfloat16", recompute="full"),
    "muon": training_of(PALM, "float32", optimizer="muon", rows=1),
    "lion": training_of(PALM, "bfloat16", optimizer="lion", rows=2),
    "gpt-j": training_of(GPTJ, "float32"),
    "gpt-j, bfloat16": training_of(GPTJ, "bfloat16"),
    "adapter": training_of(PALM, "float32", lora=ADAPTER),
    "adapter, bfloat16, full": training_of(PALM, "bfloat16", lora=ADAPTER, recompute="full"),
}


@pytest.mark.parametrize("name", RUNS)
def test_memory_of_a_step_within_five_per_cent(name: str):
    training = RUNS[name]
    peak, state, moments = measured(training)
    planned = step_memory(training, ONE, cuda=False)
    assert planned.total == pytest.approx(peak, rel=0.05)
    assert planned.moments == moments
    at_update = replace(training, rows=1, accumulation=2)
    small = step_memory(at_update, ONE, cuda=False)
    assert small.weights + small.gradients == state


def test_constants_are_those_of_the_model():
    assert (activations.BLOCK, activations.KEPT) == (attention.BLOCK, attention.KEPT)
    assert memory.CHUNK_BYTES == {
        "cpu": cross_entropy.CHUNK_BYTES,
        "cuda": cross_entropy._CHUNK_BYTES_CUDA,
    }
    assert memory.PIECE_BYTES == {
        "cpu": cross_entropy._PIECE_BYTES,
        "cuda": cross_entropy._PIECE_BYTES_CUDA,
    }


def on(layout: Layout, **more: Any) -> Memory:
    config = PRESETS["palm-8b"].config
    return step_memory(training_of(config, "bfloat16", **more), layout, cuda=True)


def test_shards_divide_the_state():
    whole, sharded = on(ONE), on(Layout(shard=8))
    for part in ("weights", "moments"):
        assert getattr(sharded, part) == pytest.approx(getattr(whole, part) / 8)
    assert on(Layout(replicate=8)).weights == whole.weights


def test_tensor_ranks_hold_all_key_value_heads_of_multi_query_attention():
    config = PRESETS["palm-8b"].config
    share = stages(config, Layout(tensor=4))[0].block / stages(config, ONE)[0].block
    assert 1 / 4 < share < 1 / 4 * 1.03
    gptj = PRESETS["gpt-j-6b"].config
    quarter = stages(gptj, Layout(tensor=4))[0].block * 4
    vectors = 3 * 3 * gptj.dim  # norms and the bias of `down` are on every rank
    assert quarter == stages(gptj, ONE)[0].block + vectors


def test_both_ends_of_a_pipeline_hold_a_tied_table():
    config = PRESETS["palm-8b"].config
    first, last = stages(config, Layout(pipeline=4))
    table = config.padded_vocab * config.dim
    assert first.tables == table
    assert last.tables == table + config.dim
    assert first.parameters + last.parameters + 2 * 8 * first.block == parameters(config) + table


def test_the_first_stage_keeps_a_microbatch_for_each_stage():
    few = on(Layout(pipeline=4), accumulation=2).activations
    many = on(Layout(pipeline=4), accumulation=16).activations
    assert many / few == pytest.approx(2, rel=0.2)


def test_context_and_tensor_ranks_divide_activations():
    whole = on(ONE).activations
    # Keys and values are those of whole rows, and there are two results of attention, and one.
    assert whole / 4 < on(Layout(context=4)).activations < whole / 4 * 1.06
    # Keys and values, and the gathered states, are whole on each tensor-parallel rank.
    assert whole / 4 < on(Layout(tensor=4)).activations < whole / 3

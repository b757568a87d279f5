"""Decoding speed (tokens/s) of the palm-150m shape compared with other projects, interleaved.

    python benchmarks/decode.py [--rounds 3] [--new 256] [--batches 1,16] [--dtype auto] [--json]

Random weights, prompt of 128 tokens, greedy. A figure covers decoding only: the time of the new
tokens after the first, the median over rounds in which every contender runs once. Peers that are
not installed are skipped and named: transformers (Llama of equal size, one key/value head, its
cache), litgpt (the same, one sequence at a time), palm-rlhf-pytorch (its own generate, without a
cache).
The share is of the machine's measured read bandwidth: weights and cache that one step must read.
Peers compute in --dtype; auto is bfloat16 where the processor has instructions for it.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch

from openpalm.base.device import pick_dtype, processor
from openpalm.generate.engine import Engine
from openpalm.generate.quantize import WeightFormat
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.config import ModelConfig, preset
from openpalm.model.transformer import Transformer, initialise

PROMPT = 128
BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}
CONFIG: ModelConfig = preset("palm-150m").config

# decode(batch, new) -> seconds of `new - 1` steps after the first token
Decode = Callable[[int, int], float]


def bandwidth() -> float:
    """Bytes a second, the best of 9 reads of a gigabyte."""
    block = torch.ones(1 << 28)
    best = 0.0
    for _ in range(9):
        start = time.perf_counter()
        block.sum()
        best = max(best, block.numel() * 4 / (time.perf_counter() - start))
    return best


def ours(model: Transformer, weights: WeightFormat, slots: int = 16) -> Decode:
    engine = Engine(model, weights=weights, slots=slots)
    greedy = Sampling(temperature=0)

    def decode(batch: int, new: int) -> float:
        generator = torch.Generator().manual_seed(0)
        vocab = model.config.vocab_size
        prompts = torch.randint(0, vocab, (batch, PROMPT), generator=generator)
        for prompt in prompts.tolist():
            engine.submit(Request(prompt, new, greedy))
        firsts = 0
        while firsts < batch:
            firsts += len(engine.step())
        made, start = 0, time.perf_counter()
        while engine.busy:
            made += len(engine.step())
        return (time.perf_counter() - start) * (new - 1) * batch / made

    return decode


def transformers_llama(dtype: torch.dtype) -> Decode:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.ff_dim,
        num_hidden_layers=CONFIG.depth,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=1,
        head_dim=CONFIG.head_dim,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()

    def decode(batch: int, new: int) -> float:
        ids = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT))
        mask = torch.ones_like(ids)
        timed = []
        for count in (1, new):  # the first token's time is the prompt's: taken off
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    pad_token_id=0,
                )
            timed.append(time.perf_counter() - start)
        return timed[1] - timed[0]

    return decode


def litgpt_llama(dtype: torch.dtype) -> Decode:
    from litgpt.config import Config
    from litgpt.generate.base import generate
    from litgpt.model import GPT

    config = Config(
        block_size=1024,
        vocab_size=CONFIG.vocab_size,
        padded_vocab_size=CONFIG.padded_vocab,
        n_layer=CONFIG.depth,
        n_head=CONFIG.heads,
        head_size=CONFIG.head_dim,
        n_query_groups=1,
        n_embd=CONFIG.dim,
        intermediate_size=CONFIG.ff_dim,
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config).to(dtype).eval()
    model.lm_head.weight = model.transformer.wte.weight

    def decode(batch: int, new: int) -> float:
        if batch > 1:
            raise NotImplementedError
        ids, timed = torch.randint(0, CONFIG.vocab_size, (PROMPT,)), []
        for count in (1, new):
            with torch.device("cpu"):
                model.set_kv_cache(batch_size=1, max_seq_length=PROMPT + count)
            start = time.perf_counter()
            with torch.inference_mode():
                generate(model, ids, PROMPT + count, temperature=0.0)
            timed.append(time.perf_counter() - start)
            model.clear_kv_cache()
        return timed[1] - timed[0]

    return decode


def palm_rlhf(dtype: torch.dtype) -> Decode:
    from palm_rlhf_pytorch import PaLM

    model = PaLM(
        num_tokens=CONFIG.vocab_size,
        dim=CONFIG.dim,
        depth=CONFIG.depth,
        heads=CONFIG.heads,
        dim_head=CONFIG.head_dim,
    )
    model = model.to(dtype).eval()

    def decode(batch: int, new: int) -> float:
        if batch > 1:
            raise NotImplementedError
        ids = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT))
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(PROMPT + new, prompt=ids, use_tqdm=False)  # the length in all
        return (time.perf_counter() - start) * (new - 1) / new

    return decode


def contenders(model: Transformer, dtype: str) -> dict[str, tuple[Decode, float]]:
    """Name -> how it decodes, and its bytes a weight."""
    weights: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")
    found = {f"OpenPaLM {w}": (ours(model, w), BYTES_A_WEIGHT[w]) for w in weights}
    peers = {
        f"transformers {dtype}": transformers_llama,
        f"litgpt {dtype}": litgpt_llama,
        f"palm-rlhf-pytorch {dtype}": palm_rlhf,
    }
    for name, make in peers.items():
        try:
            found[name] = (make(getattr(torch, dtype)), BYTES_A_WEIGHT[dtype])
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    dtype = pick_dtype(arguments.dtype, torch.device("cpu"))
    print(processor(), file=sys.stderr)
    decoders, rows = contenders(model, dtype), []
    for batch in map(int, arguments.batches.split(",")):
        rates: dict[str, list[float]] = {name: [] for name in decoders}
        reads = []
        for turn in range(arguments.rounds + 1):  # the first warms up
            reads.append(bandwidth())
            for name, (decode, _) in decoders.items():
                try:
                    seconds = decode(batch, arguments.new)
                except NotImplementedError:
                    continue
                if turn:
                    rates[name].append(batch * (arguments.new - 1) / seconds)
                print(f"batch {batch} round {turn} {name}", file=sys.stderr)
        for name, measured in rates.items():
            if not measured:
                continue
            rate = statistics.median(measured)
            number = 4 if "float32" in name else 2
            cache = batch * CONFIG.kv_bytes_per_token(number) * (PROMPT + arguments.new / 2)
            bytes_a_step = CONFIG.parameters * decoders[name][1] + cache
            share = rate / batch * bytes_a_step / max(reads)
            row = {"batch": batch, "who": name, "tokens_per_s": rate, "share_of_bandwidth": share}
            rows.append(row | {"bandwidth_gb_per_s": max(reads) / 1e9})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"batch {row['batch']:>2}  {row['who']:<28}{row['tokens_per_s']:>9.1f} tok/s"
            f"{row['share_of_bandwidth']:>7.0%} of {row['bandwidth_gb_per_s']:.0f} GB/s"
        )


if __name__ == "__main__":
    main()

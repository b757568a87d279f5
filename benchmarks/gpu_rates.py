"""Rates of the device that gpu.py measures: matrix products, copies, attention, decoding."""

import warnings
from collections.abc import Iterator
from typing import Any

import decode
import torch
import torch.nn.functional as F
from gpu_bench import Bench, Item, fastest, memory
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_common import Row

from openpalm.model.transformer import Transformer, initialise
from openpalm.train.sizing.measure import matmul_flops

DECODED = {"palm-150m": 8, "palm-410m": 12, "palm-1b": 25}
"""Models that decode, and the seconds of it."""


def ceilings(bench: Bench) -> Iterator[Item]:
    yield Item("matrix products", 5, lambda: products(bench))
    yield Item("copy", 3, lambda: copy(bench))


def products(bench: Bench) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        rate = matmul_flops(bench.device, dtype, repeats=2 if bench.tiny else 20)
        yield {"ceiling": f"matrix product, {dtype}", "tflop_per_s": rate / 1e12}
        bench.matmul = bench.matmul or rate  # bfloat16's


def copy(bench: Bench) -> Iterator[Row]:
    source = torch.randn((1 << 20) if bench.tiny else (1 << 30), device=bench.device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), bench.device)
    bench.copy = 2 * source.nbytes / seconds
    yield {"ceiling": "copy on the device, read and written", "gb_per_s": bench.copy / 1e9}


def decoding(bench: Bench) -> Iterator[Item]:
    for name, needs_s in DECODED.items():
        yield Item(name, needs_s, lambda name=name: decoded(bench, name))


def decoded(bench: Bench, name: str) -> Iterator[Row]:
    """Greedy decoding in bfloat16 by the engine, for one sequence and for 32."""
    config, new = bench.config(name), 16 if bench.tiny else 128
    model = Transformer(config).to(bench.device)
    initialise(model, seed=0)
    for batch in (1, 32):
        decoder = decode.ours(model, "bfloat16", slots=batch)
        cold = decoder(batch, new)
        seconds = decoder(batch, new)
        rate = batch * (new - 1) / seconds
        cache = batch * config.kv_bytes_per_token(2) * (decode.PROMPT + new / 2)
        read = 2 * config.parameters + cache
        row = {"decoding": name, "batch": batch, "tokens_per_s": rate}
        share = {"share_of_copy": rate / batch * read / bench.copy} if bench.copy else {}
        yield row | {"step_ms": batch / rate * 1e3, "first_pass_s": cold} | share


def attention(bench: Bench) -> Iterator[Item]:
    """Causal attention of palm-150m's shape, forward and backward, by dtype, form and kernel."""
    for dtype in (torch.bfloat16, torch.float32):
        for form in ("gqa", "repeated", "expanded", "masked gqa", "masked expanded"):
            name = f"{dtype}, {form}"
            yield Item(name, 4, lambda dtype=dtype, form=form: kernels(bench, dtype, form))


def kernels(bench: Bench, dtype: torch.dtype, form: str) -> Iterator[Row]:
    length = 64 if bench.tiny else 8192
    every = {"chosen": None, "flash": SDPBackend.FLASH_ATTENTION}
    every |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, kernel in every.items():
        row = {"attention": form, "dtype": str(dtype), "kernel": name}
        yield row | attended(bench.device, dtype, form, length, kernel)


def attended(
    device: torch.device, dtype: torch.dtype, form: str, length: int, kernel: SDPBackend | None
) -> Row:
    q = torch.randn(1, length, 8, 128, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(1, length, 1, 128, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    causal = torch.ones(1, 1, length, length, device=device, dtype=torch.bool).tril()
    masked, gqa = "masked" in form, "gqa" in form

    def work() -> None:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if "expanded" in form:
            keys, values = (x.expand(-1, 8, -1, -1) for x in (keys, values))
        elif form == "repeated":
            keys, values = (x.repeat_interleave(8, 1) for x in (keys, values))
        how: dict[str, Any] = {"attn_mask": causal} if masked else {"is_causal": True}
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=gqa, **how)
        out.sum().backward()

    with memory(device) as peak:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kernel is None:
                    seconds = fastest(work, device, 3)
                else:
                    with sdpa_kernel(kernel):
                        seconds = fastest(work, device, 3)
        except RuntimeError as error:
            return {"left_out": str(error).split("\n")[0][:80]}
    return {"ms": seconds * 1e3, **peak}

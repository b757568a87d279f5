"""benchmarks/gpu.py on small shapes on a CPU: every part gives its rows."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from openpalm.model.attention import _by_products, _for_each_query_head

GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


def test_rehearsal(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(GPU), "--tiny", "--device", "cpu", "--out", str(out)]
    command += ["--parts", "ceilings,decoding", "--minutes", "1"]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["batch"] for row in rows if "batch" in row] == [1, 32, 1, 32]
    assert not any("error" in row for row in rows)


def test_what_a_gpu_computes_is_sdpas():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    wide = [_for_each_query_head(x, q) for x in (k, v)]
    mask = torch.tensor([[True, True, False, True, False]])
    torch.testing.assert_close(sdpa(q, *wide), sdpa(q, k, v, enable_gqa=True))
    torch.testing.assert_close(_by_products(q, *wide, mask), sdpa(q, *wide, attn_mask=mask))

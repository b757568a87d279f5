"""benchmarks/gpu.py on small shapes on a CPU: every part gives its rows, within its time."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from openpalm.model.attention import _by_products, _for_each_query_head

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def modules(monkeypatch) -> dict[str, ModuleType]:
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_bench
    import gpu_checks
    import gpu_ranks
    import gpu_training

    return {m.__name__: m for m in (gpu_bench, gpu_checks, gpu_ranks, gpu_training)}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_rehearsal(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--device", "cpu"]
    command += ["--parts", "ceilings,decoding,training", "--models", "palm-150m", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    rows = rows_of(out)
    assert not any("error" in row for row in rows)
    assert [row["batch"] for row in rows if "batch" in row] == [1, 32] * 3
    found = {row["who"]: row for row in rows if "training" in row}
    assert {"plan_gb", "plan_time_ratio", "mfu"} <= {*found["OpenPaLM"]}
    assert found["OpenPaLM, compiled"]["graph_breaks"] == 0
    assert found["palm-rlhf-pytorch, flash"]["left_out"] == "no --peer FOLDER"


def test_checks_of_numbers(modules):
    checks = modules["gpu_checks"]
    rows = [*checks.trainer_and_engine(CPU), *checks.offloaded(CPU), *checks.float16(CPU)]
    assert [row["check"] for row in rows if not row["ok"]] == []
    assert len(rows) == 5


def test_memory_part_has_the_plans_figures(modules):
    bench = modules["gpu_bench"].Bench(CPU, tiny=True)
    for way in modules["gpu_training"].WAYS[:2]:
        [row] = modules["gpu_training"].remembered(bench, way)
        assert row["plan_gb"] > 0


def test_items_that_do_not_fit_or_fail_leave_the_others(modules, tmp_path):
    bench_module = modules["gpu_bench"]
    ran, out = [], tmp_path / "rows.jsonl"

    def work(name: str):
        ran.append(name)
        if name == "bad":
            raise ValueError("no such kernel")
        yield {"did": name}

    def items(bench):
        for name, needs_s in (("long", 1e6), ("bad", 0), ("good", 0)):
            yield bench_module.Item(name, needs_s, lambda name=name: work(name))

    parts = [bench_module.Part(name, 1, items) for name in ("one", "two")]
    assert not bench_module.measure(bench_module.Bench(CPU), parts, 60, out)
    assert ran == ["bad", "good"] * 2
    rows = [row for row in rows_of(out) if row["part"] == "two"]
    assert rows[0]["left_out"].startswith("needs about 1000000 s of the ")
    assert rows[1]["error"] == "ValueError: no such kernel"
    assert rows[2]["did"] == "good"


def test_an_item_is_stopped_when_its_part_ends(modules):
    bench_module = modules["gpu_bench"]

    def endless():
        while True:
            pass
        yield

    def items(bench):
        yield bench_module.Item("endless", 0, endless)

    assert not bench_module.measure(
        bench_module.Bench(CPU), [bench_module.Part("x", 1, items)], 1, None
    )


def test_fsdp_on_a_mesh_of_one_process(modules):
    bench = modules["gpu_bench"].Bench(CPU, tiny=True, ends=float("inf"))
    items = {item.name: item for item in modules["gpu_ranks"].fsdp_part(bench)}
    rows = [*items["1 processes"].rows(), *items["several"].rows()]
    assert [row.get("ok") for row in rows] == [True, True, None]
    assert rows[-1]["left_out"] == "one cpu device"


def test_what_a_gpu_computes_is_sdpas():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    wide = [_for_each_query_head(x, q) for x in (k, v)]
    mask = torch.tensor([[True, True, False, True, False]])
    torch.testing.assert_close(sdpa(q, *wide), sdpa(q, k, v, enable_gqa=True))
    torch.testing.assert_close(_by_products(q, *wide, mask), sdpa(q, *wide, attn_mask=mask))

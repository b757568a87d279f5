"""What the build server leaves out, beyond the tests that carry the marker `whole` themselves.

It keeps every kind of layout, verb and fault; left out are further sizes and combinations.
"""

import re

import pytest

LEFT_OUT = [
    r"test_context.*\[4-",
    r"test_elastic.*\[2-4\]",
    r"test_kills.*killed_processes",  # `benchmarks/kill.py --processes 2` kills more often
    r"test_kills.*damaged_checkpoint",  # tests/resume damages checkpoints of one process
    r"test_layouts.*-muon\]",  # test_optimizers keeps Muon on shards
    r"test_layouts.*\[(fsdp-3|context-4|context-2-replicas-2)-",
    r"test_optimizers.*\[\w[\w-]*-(fsdp-3|hsdp-2x2)\]",
    r"test_optimizers.*noise_scale.*\[(hsdp-2x2|tensor-2-context-2|pipeline-2-|pipeline-4)",
    r"test_pipeline.*\[(gpipe|untied|ramp|fsdp-interleaved-recompute|replicas|muon|uneven-4)\]",
    r"test_pipeline.*\[(context-interleaved|untied-interleaved|tensor|document-mask)\]",
    r"test_pipeline.*bfloat16.*\[4-",
    r"test_reshard.*\[(tensor-2x2-|4-tensor|1-tensor-2x2|2-tensor-2x2|2x2-tensor-2x2|tensor-2-4)",
    r"test_reshard.*\[(4-4|4-2x2|2x2-4|2x2-2x2)\]",
    r"test_tensor\.py.*\[(2|4|3-sequence|4-sequence|2x2-replicas|2x2-shards)\]",
    r"test_tensor_losses.*\[(2x2|2)-",
    r"test_verbs.*-replicate-2\]",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in LEFT_OUT):
            item.add_marker(pytest.mark.whole)

"""torch.hub entry points: the four PaLMs that conceptofmind published, as Transformers.

model = torch.hub.load(REPOSITORY, "palm_410m_8k_v0")
logits = model.logits(ids)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # torch.hub clones, it does not install

from openpalm import Transformer
from openpalm import load as _load
from openpalm.convert.published import fetch as _fetch

dependencies = [
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "rich",
    "yaml",
    "huggingface_hub",
    "httpx2",
]


def palm_150m_8k_v0(
    path: str | None = None,
    url: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Transformer:
    """PaLM of 150 million parameters, trained at 8192 tokens; eval mode.

    path: a local palm_150m_8k_v0.pt; url: where to download it from instead;
    dtype: float32 or bfloat16. `model.logits(ids)` takes ids [batch, time].
    """
    return _load(_fetch("palm_150m_8k_v0", path=path, url=url), device, dtype)


def palm_410m_8k_v0(
    path: str | None = None,
    url: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Transformer:
    """PaLM of 410 million parameters, trained at 8192 tokens; arguments as palm_150m_8k_v0."""
    return _load(_fetch("palm_410m_8k_v0", path=path, url=url), device, dtype)


def palm_1b_8k_v0(
    path: str | None = None,
    url: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Transformer:
    """PaLM of 1 billion parameters, trained at 8192 tokens; arguments as palm_150m_8k_v0."""
    return _load(_fetch("palm_1b_8k_v0", path=path, url=url), device, dtype)


def palm_2b_8k_v0(
    path: str | None = None,
    url: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Transformer:
    """PaLM of 2.1 billion parameters, trained at 8192 tokens; arguments as palm_150m_8k_v0."""
    return _load(_fetch("palm_2b_8k_v0", path=path, url=url), device, dtype)

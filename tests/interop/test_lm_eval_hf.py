"""lm-evaluation-harness's own hf model on exported folders scores as our model class does.

Needs accelerate, which `lm-eval[hf]` brings.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, ok
from lm_eval.evaluator import evaluate

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.evaluate.harness import HarnessModel, as_lm
from openpalm.evaluate.tasks import Tasks, load_tasks
from openpalm.generate.engine import Engine
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

pytest.importorskip("accelerate", reason="pip install 'lm-eval[hf]'")

DATA = Path(__file__).parent / "data"
SIX = ["lambada_openai", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa"]
OWN: dict[str, dict[str, Any]] = {
    "rolled": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {
            "until": ["$", "never there"],
            "max_gen_toks": 12,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match"}],
    },
}
GPTJ = ModelConfig(
    vocab_size=265,
    dim=32,
    depth=2,
    heads=4,
    head_dim=8,
    ff_dim=64,
    kv_heads=4,
    context=160,
    feedforward="gelu",
    bias=True,
    tied=False,
    rotary="interleaved",
    rotary_dims=4,
)
"""A GPT-J: biases, a partial rotary embedding, a head of its own."""
PALM = ModelConfig(**{**TINY.__dict__, "context": 160})


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Tasks:
    """The six of the original, rolling windows beyond the context, and generation."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text} for text in ("The quick brown fox.", "né", "windows, " * 40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, task in OWN.items():
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        definition = {"task": name, "test_split": "test", "dataset_path": "json"} | task
        definition |= {"dataset_kwargs": data}
        (folder / f"{name}.yaml").write_text(json.dumps(definition), encoding="utf-8")
    loaded = [load_tasks(SIX, DATA), load_tasks([*OWN], folder)]
    both = loaded[0].loaded["tasks"] | loaded[1].loaded["tasks"]
    return Tasks((*SIX, *OWN), loaded[0].loaded | {"tasks": both}, None, None, False, {})


@pytest.fixture(scope="module", params=[PALM, GPTJ], ids=["palm", "gptj"])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of ours, and the same model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models")
    model = Transformer(request.param)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # logits far apart, so that rounding decides no choice
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
    checkpoint.save(folder / "ours", model, tokenizer_json=Tokenizer.byte().definition)
    ok("convert", folder / "ours", folder / "theirs", "--to", "huggingface")
    return folder / "ours", folder / "theirs"


def answers(lm: Any, tasks: Tasks) -> dict[str, Any]:
    """The library's figures, and what the model answered to each request."""
    found = evaluate(lm, tasks.loaded, bootstrap_iters=0, log_samples=True)
    responses = {
        name: [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }
    return {"results": found["results"], "responses": responses}


def test_their_model_scores_as_ours(folders, tasks):
    from lm_eval.models.huggingface import HFLM

    ours, theirs = folders
    with torch.random.fork_rng():
        reference = HFLM(
            pretrained=str(theirs),
            device="cpu",
            dtype="float32",
            batch_size=3,
            trust_remote_code=True,
        )
        expected = answers(reference, tasks)
    model = HarnessModel(Engine(checkpoint.load(ours)), Tokenizer.load(ours))
    found = answers(as_lm(model), tasks)
    assert _flat(found["responses"]["said"]) == _flat(expected["responses"]["said"])
    for task in (*SIX, "rolled"):
        their_answers = _flat(expected["responses"][task])
        assert _flat(found["responses"][task]) == pytest.approx(their_answers, rel=1e-4), task
    for task in SIX:
        for name, value in expected["results"][task].items():
            if name.startswith("acc"):
                assert found["results"][task][name] == value, (task, name)
    # The comparison says something: not every choice is the same.
    greedy = {answer for task in SIX for answer in _flat(found["responses"][task])}
    assert len(greedy) > 20
    assert len({*_flat(found["responses"]["said"])}) > 1


def _flat(nested: Any) -> list[Any]:
    if isinstance(nested, list | tuple):
        return [leaf for each in nested for leaf in _flat(each)]
    return [nested]

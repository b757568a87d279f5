"""README.md of an exported model: what it is, how to load it, where it came from."""

import json
from typing import Any

from openpalm import __version__
from openpalm.generate.defaults import SamplingDefaults
from openpalm.model.config import ModelConfig, RewardConfig

_LOAD_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
"""
_LOAD_REWARD = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForSequenceClassification.from_pretrained(PATH, trust_remote_code=True)
text = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**text).logits)  # the reward, [batch, 1]
"""
_REMOTE_CODE = [
    "`trust_remote_code=True` runs modeling_openpalm.py of this folder; it imports only torch and "
    "transformers. OpenPaLM itself reads config.json and the safetensors files and runs no code.",
    "",
]
_WORDS = {
    "kind": "how it was made",
    "source": "source",
    "source_file": "source file",
    "source_sha256": "SHA-256 of the source",
    "era": "version of the source",
    "parent": "manifest hash of the parent checkpoint",
    "data": "digest of the training data",
    "step": "training steps",
    "checkpoint": "manifest hash of the exported checkpoint",
}


def model_card(
    config: ModelConfig,
    reward: RewardConfig | None,
    *,
    dtype: str,
    defaults: SamplingDefaults,
    lineage: dict[str, Any],
    notes: list[str],
    native: bool = False,
) -> str:
    """The card, with a YAML header that the Hub reads.

    native: transformers has the model itself.
    """
    what = "PaLM-style language model" if reward is None else f"{reward.kind} reward model"
    task = "text-generation" if reward is None else "text-classification"
    header = ["library_name: transformers", f"pipeline_tag: {task}", "tags:", "- openpalm"]
    if reward is None:
        header += _inference(defaults)
    lines = ["---", *header, "---", "", "# Model card", ""]
    lines += [f"A {what} of {config.parameters:,} parameters in {dtype}.", ""]
    lines += [f"Exported by OpenPaLM {__version__}.", ""]
    code = (_LOAD_TEXT if reward is None else _LOAD_REWARD).rstrip()
    code = code.replace(", trust_remote_code=True", "") if native else code
    lines += ["```python", code, "```", "", *([] if native else _REMOTE_CODE)]
    lines += [
        "| | |",
        "|---|---|",
        f"| width x depth | {config.dim} x {config.depth} |",
        f"| heads | {config.heads} of {config.head_dim}, {config.kv_heads} key/value |",
        f"| context | {config.context} tokens |",
        f"| vocabulary | {config.vocab_size} |",
        "",
    ]
    lines += [f"Note: {note}.\n" for note in notes]
    lines += _lineage_lines(lineage)
    lines += ["It repeats what its data says, true or not; check its answers.", ""]
    return "\n".join(lines)


def _inference(defaults: SamplingDefaults) -> list[str]:
    return ["inference:", "  parameters:", *(f"    {k}: {v}" for k, v in vars(defaults).items())]


def _lineage_lines(lineage: dict[str, Any]) -> list[str]:
    lines = ["## Lineage", "", "| | |", "|---|---|"]
    lines += [
        f"| {words} | {_cell(lineage[name])} |"
        for name, words in _WORDS.items()
        if lineage.get(name) is not None
    ]
    whole = json.dumps(lineage, indent=1, ensure_ascii=True, sort_keys=True)
    return [
        *lines,
        "",
        "<details><summary>all of it</summary>",
        "",
        *_fenced(whole),
        "</details>",
        "",
    ]


def _fenced(text: str) -> list[str]:
    return ["```json", text.replace("```", "\\u0060\\u0060\\u0060"), "```", ""]


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())[:120]

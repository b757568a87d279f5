"""Exports a model as a folder that transformers' Auto classes load; see docs/hugging-face.md.

    config.json  generation_config.json  README.md  modeling_openpalm.py
    model.safetensors                  or shards and model.safetensors.index.json
    tokenizer.json  tokenizer_config.json  special_tokens_map.json  chat_template.jinja

The folder is written under a temporary name, reloaded and compared, and then renamed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openpalm.base.files import atomic_folder
from openpalm.checkpoint import tensors
from openpalm.convert.export import TOLERANCE, check_output_directory
from openpalm.convert.huggingface import chat_template, weights
from openpalm.convert.huggingface.card import model_card
from openpalm.convert.huggingface.names import MODELING_FILE, config_json, parts_of
from openpalm.convert.huggingface.read import read_palm
from openpalm.data.text.conversation import stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import SettingsError, StorageError, WorkError
from openpalm.generate.defaults import SamplingDefaults
from openpalm.model import lora
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer

_HALF_TOLERANCE = 0.05
"""TOLERANCE for weights of 16 bits, which have three digits."""
_CHECK_SHAPE = (2, 32)
_PADDING = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|reserved_3|>")


class Exported(NamedTuple):
    """The result of an export."""

    difference: float
    """largest difference of reloaded logits, or rewards"""
    notes: list[str]
    """one line each: who reloaded it, what the folder does not express"""


def save_as_huggingface(
    model: Transformer,
    directory: Path,
    *,
    lineage: dict[str, Any],
    tokenizer_json: str | None = None,
    dtype: str = "float32",
    defaults: SamplingDefaults | None = None,
    max_shard_bytes: int = weights.MAX_SHARD_BYTES,
) -> Exported:
    """Writes the folder; adapters are merged.

    Raises SettingsError for an unknown dtype, CheckpointError if the directory is not empty,
    StorageError if the disk is full, WorkError if a weight does not fit the dtype or the reloaded
    logits differ; then nothing is left behind.
    """
    if dtype not in weights.DTYPES:
        raise SettingsError(f"--dtype {dtype}: must be one of {', '.join(weights.DTYPES)}")
    check_output_directory(directory)
    model = lora.merged(model)
    tokenizer = None
    if tokenizer_json is not None:
        tokenizer = Tokenizer(tokenizer_json.encode(), "tokenizer.json")
    try:
        with atomic_folder(directory) as partial:
            weights.write(partial, _stored(model), weights.DTYPES[dtype], max_shard_bytes)
            notes = _write_configs(partial, model, tokenizer, dtype, defaults or SamplingDefaults())
            difference, checked = _check(model, partial, dtype, directory)
            notes.append(checked)
            card = model_card(
                model.config,
                model.reward if isinstance(model, RewardModel) else None,
                dtype=dtype,
                defaults=defaults or SamplingDefaults(),
                lineage=lineage,
                notes=notes[:-1],
            )
            _write(partial / "README.md", card)
    except BaseException as error:
        if refused := tensors.refusal(error):
            raise StorageError(f"{directory}: cannot be saved ({refused})") from error
        raise
    return Exported(difference, notes)


def _stored(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    reward = isinstance(model, RewardModel)
    for name, parameter in model.published_parameters():
        for part in parts_of(name, model.config, reward=reward):
            yield part.name, parameter[part.rows]


def _write_configs(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    dtype: str,
    defaults: SamplingDefaults,
) -> list[str]:
    """Everything but weights and card; returns notes."""
    reward = model.reward if isinstance(model, RewardModel) else None
    end = None if tokenizer is None else tokenizer.end_of_text
    padding = None if tokenizer is None else _padding_id(tokenizer)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": padding}
    _write_json(folder / "config.json", config_json(model.config, reward, dtype, ids))
    source = Path(__file__).with_name(MODELING_FILE).read_text(encoding="utf-8")
    _write(folder / MODELING_FILE, source)
    notes = []
    if reward is None:
        _write_json(folder / "generation_config.json", _generation(tokenizer, ids, defaults))
    elif not model.config.tied or model.config.bias:
        notes.append("the output head is left out, because a reward model does not use it")
    if tokenizer is None:
        return [*notes, "the checkpoint has no tokenizer, so the folder has none"]
    return notes + _write_tokenizer(folder, tokenizer, model.config.context, reward is not None)


def _generation(
    tokenizer: Tokenizer | None, ids: dict[str, int | None], defaults: SamplingDefaults
) -> dict[str, Any]:
    stops = [] if tokenizer is None else sorted(stop_ids(tokenizer))
    sampling = {"do_sample": defaults.temperature > 0}
    if sampling["do_sample"]:
        # transformers takes the 50 likeliest tokens where top_k is not given.
        sampling |= vars(defaults)
    content = sampling | ids | {"eos_token_id": stops or None}
    return {name: value for name, value in content.items() if value is not None}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int, reward: bool) -> list[str]:
    definition = tokenizer.definition
    _write(folder / "tokenizer.json", definition)
    named = {"pad_token": _padding_id(tokenizer)}
    named |= {"bos_token": tokenizer.end_of_text, "eos_token": tokenizer.end_of_text}
    tokens = {
        name: chat_template.token_text(tokenizer, number)
        for name, number in named.items()
        if number is not None
    }
    _write_json(folder / "special_tokens_map.json", tokens)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # A prompt must end where its completion begins.
        "padding_side": "right" if reward else "left",
    }
    _write_json(folder / "tokenizer_config.json", settings | tokens)
    template = chat_template.chat_template(tokenizer)
    _write(folder / "chat_template.jinja", template)
    odd = chat_template.difference(tokenizer, definition, template)
    if odd is None:
        return []
    return [
        "chat_template.jinja writes the same text as OpenPaLM's template, but "
        f"{odd}: OpenPaLM encodes the parts of a turn one by one"
    ]


def _padding_id(tokenizer: Tokenizer) -> int | None:
    """A token for padding: one that no text has; else the end-of-text token."""
    found = (tokenizer.special_id(name) for name in _PADDING)
    return next((number for number in found if number is not None), tokenizer.end_of_text)


def _check(model: Transformer, partial: Path, dtype: str, directory: Path) -> tuple[float, str]:
    """Reloads the folder; the largest difference of outputs, and a note that tells who read it."""
    ids, lengths = _inputs(model)
    expected = _output(model, ids, lengths)
    try:
        transformers = import_module("transformers")
    except ImportError:
        found = _output(read_palm(partial).model.float(), ids, lengths)
        reader = "OpenPaLM itself (transformers is not installed)"
    else:
        found = _transformers_output(partial, ids, lengths, isinstance(model, RewardModel))
        reader = f"transformers {transformers.__version__}"
    difference = (expected - found).abs().max().item()
    tolerance = TOLERANCE if dtype == "float32" else _HALF_TOLERANCE
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):  # also true for nan
        raise WorkError(
            f"{directory}: its logits, reloaded by {reader}, differ by {difference:.1e}; "
            "nothing was written"
        )
    return difference, f"reloaded by {reader}"


def _inputs(model: Transformer) -> tuple[Tensor, Tensor]:
    rows, time = _CHECK_SHAPE
    ids = (torch.arange(rows * time) * 7919 % model.config.vocab_size).view(rows, time)
    return ids, torch.full((rows,), time // 2)


@torch.no_grad()
def _output(model: Transformer, ids: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Logits, or the rewards [rows] of a reward model, in float32 on the CPU."""
    training, device = model.training, model.embedding.device
    model.eval()
    ids, prompt_lengths = ids.to(device), prompt_lengths.to(device)
    if isinstance(model, RewardModel):
        found = model.value(ids, prompt_lengths=prompt_lengths)
    else:
        found = model.logits(ids)
    model.train(training)
    return found.cpu()


@torch.no_grad()
def _transformers_output(folder: Path, ids: Tensor, lengths: Tensor, reward: bool) -> Tensor:
    """The output of the folder's model in transformers.

    Our own copy of the modelling file runs it: the folder's is the same, and would be copied into
    the user's module cache.
    """
    from openpalm.convert.huggingface import modeling_openpalm as modeling

    kind: Any = (
        modeling.OpenPalmForSequenceClassification if reward else modeling.OpenPalmForCausalLM
    )
    with _quiet_transformers():
        loaded, report = kind.from_pretrained(folder, output_loading_info=True)
    if odd := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise WorkError(f"{folder}: transformers does not find the weights of {odd[0]}")
    loaded = loaded.float().eval()
    if reward:
        return loaded(input_ids=ids, prompt_lengths=lengths).logits[:, 0]
    return loaded(input_ids=ids, use_cache=False).logits


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and advice."""
    logging = import_module("transformers.utils.logging")
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

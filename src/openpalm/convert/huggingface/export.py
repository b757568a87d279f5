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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openpalm.base.files import atomic_folder
from openpalm.checkpoint import tensors
from openpalm.checkpoint.lazy_state import LazyState
from openpalm.checkpoint.streamed_logits import streamed_logits
from openpalm.convert.export import TOLERANCE, check_output_directory
from openpalm.convert.huggingface import chat_template
from openpalm.convert.huggingface.card import model_card
from openpalm.convert.huggingface.names import MODELING_FILE, config_json, parts_of
from openpalm.convert.huggingface.read import read_palm
from openpalm.convert.shard_files import MAX_SHARD_BYTES, filled_shards
from openpalm.data.text.conversation import stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import StorageError, WorkError
from openpalm.generate.defaults import SamplingDefaults
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel, make_model

_CHECK_SHAPE = (2, 32)
_MAX_COMPARED_BYTES = 8 << 30
"""Largest model, in float32, that transformers loads whole for a comparison."""
_PADDING = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|reserved_3|>")


class Exported(NamedTuple):
    """The result of an export."""

    difference: float
    """largest difference of reloaded logits, or rewards"""
    notes: list[str]
    """one line each: who reloaded it, what the folder does not express"""


def save_as_huggingface(
    config: ModelConfig,
    weights: LazyState,
    directory: Path,
    *,
    reward: RewardConfig | None = None,
    tokenizer_json: str | None = None,
    defaults: SamplingDefaults | None = None,
    lineage: dict[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Writes the folder, in the dtype of the weights; one tensor is in memory at a time.

    weights: our tensors, adapters merged. Raises CheckpointError if the directory is not empty,
    StorageError if the disk is full, WorkError if the reloaded logits differ; then nothing is left
    behind.
    """
    check_output_directory(directory)
    defaults = defaults or SamplingDefaults()
    dtype = str(weights.entries["embedding"].dtype).removeprefix("torch.")
    try:
        with atomic_folder(directory) as partial:
            expected = _write_weights(partial, config, reward, weights, max_shard_bytes)
            source = Path(__file__).with_name(MODELING_FILE).read_text(encoding="utf-8")
            _write(partial / MODELING_FILE, source)
            _write_json(partial / "config.json", config_json(config, reward, dtype))
            notes = write_around(
                *(partial, config, reward),
                dtype=dtype,
                tokenizer_json=tokenizer_json,
                defaults=defaults,
                lineage=lineage,
            )
            difference, reader = _check(partial, config, reward, expected)
            if not difference <= TOLERANCE:  # also true for nan
                raise WorkError(
                    f"{directory}: its outputs, reloaded by {reader}, differ by {difference:.1e}; "
                    "nothing was written"
                )
    except BaseException as error:
        if refused := tensors.refusal(error):
            raise StorageError(f"{directory}: cannot be saved ({refused})") from error
        raise
    return Exported(difference, [*notes, f"reloaded by {reader}"])


@torch.no_grad()
def _write_weights(
    folder: Path,
    config: ModelConfig,
    reward: RewardConfig | None,
    weights: LazyState,
    max_shard_bytes: int,
) -> Tensor:
    """Writes the tensors under the names of the modelling file; returns the model's output for
    `_inputs`, which the same pass computes."""
    parts = {name: parts_of(name, config, reward=reward is not None) for name in weights}
    layout = {
        part.name: (part.shape(entry.shape), entry.dtype)
        for name, entry in weights.entries.items()
        for part in parts[name]
    }
    with filled_shards(folder, layout, max_shard_bytes) as put:

        def put_parts(name: str, tensor: Tensor) -> None:
            for part in parts[name]:
                put(part.name, tensor[part.rows])

        return _output(config, reward, weights.copied_to(put_parts))


def write_around(
    folder: Path,
    config: ModelConfig,
    reward: RewardConfig | None,
    *,
    dtype: str,
    tokenizer_json: str | None,
    defaults: SamplingDefaults,
    lineage: dict[str, Any],
    native: bool = False,
) -> list[str]:
    """Writes what is not the model: tokenizer, generation config, card; returns notes.

    Adds the ids of special tokens to the folder's config.json. native: transformers has the model
    itself, without the modelling file.
    """
    tokenizer = None
    if tokenizer_json is not None:
        tokenizer = Tokenizer(tokenizer_json.encode(), "tokenizer.json")
    end = None if tokenizer is None else tokenizer.end_of_text
    padding = None if tokenizer is None else _padding_id(tokenizer)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": padding}
    ids = {name: number for name, number in ids.items() if number is not None}
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", content | ids)
    notes = []
    if reward is None:
        _write_json(folder / "generation_config.json", _generation(tokenizer, ids, defaults))
    elif not config.tied or config.bias:
        notes.append("the output head is left out, because a reward model does not use it")
    if tokenizer is None:
        notes.append("the checkpoint has no tokenizer, so the folder has none")
    else:
        notes += _write_tokenizer(folder, tokenizer, config.context, padding_left=reward is None)
    card = model_card(
        *(config, reward),
        dtype=dtype,
        defaults=defaults,
        lineage=lineage,
        notes=notes,
        native=native,
    )
    _write(folder / "README.md", card)
    return notes


def _generation(
    tokenizer: Tokenizer | None, ids: dict[str, int], defaults: SamplingDefaults
) -> dict[str, Any]:
    stops = [] if tokenizer is None else sorted(stop_ids(tokenizer))
    sampling: dict[str, Any] = {"do_sample": defaults.temperature > 0}
    if defaults.temperature > 0:
        # transformers takes the 50 likeliest tokens where top_k is not given.
        sampling |= vars(defaults)
    return sampling | ids | ({"eos_token_id": stops} if stops else {})


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, context: int, *, padding_left: bool
) -> list[str]:
    """Writes the files that AutoTokenizer reads, and the chat template; returns notes.

    padding_left: for generation, where a prompt must end where its completion begins.
    """
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
        "padding_side": "left" if padding_left else "right",
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


@torch.no_grad()
def _check(
    folder: Path, config: ModelConfig, reward: RewardConfig | None, expected: Tensor
) -> tuple[float, str]:
    """Reloads the folder. The largest difference of outputs in float32, relative to the largest
    output where that is above one; and who reloaded it."""
    try:
        transformers = import_module("transformers")
    except ImportError:
        found = _output(*read_palm(folder))
        reader = "OpenPaLM itself (transformers is not installed)"
    else:
        found = _transformers_output(folder, _inputs(config), reward is not None)
        reader = f"transformers {transformers.__version__}"
    return ((expected - found).abs().max() / expected.abs().max().clamp_min(1)).item(), reader


def _inputs(config: ModelConfig) -> Tensor:
    rows, time = _CHECK_SHAPE
    return (torch.arange(rows * time) * 7919 % config.vocab_size).view(rows, time)


def _output(config: ModelConfig, reward: RewardConfig | None, weights: LazyState) -> Tensor:
    """Logits [rows, time, vocabulary], or the rewards [rows] of a reward model, in float32."""
    ids = _inputs(config)
    if reward is None:
        return streamed_logits(config, weights, ids)
    with torch.device("meta"):
        model = make_model(config, reward).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    assert isinstance(model, RewardModel)
    return model.value(ids, prompt_lengths=_prompt_lengths(ids))


def _prompt_lengths(ids: Tensor) -> Tensor:
    return torch.full(ids.shape[:1], ids.shape[1] // 2)


def _transformers_output(folder: Path, ids: Tensor, is_reward: bool) -> Tensor:
    """As `_output`, by transformers.

    Our own copy of the modelling file runs it: the folder's is the same, and would be copied into
    the user's module cache.
    """
    from openpalm.convert.huggingface import modeling_openpalm as modeling

    kind: Any = (
        modeling.OpenPalmForSequenceClassification if is_reward else modeling.OpenPalmForCausalLM
    )
    with _quiet_transformers():
        loaded, report = kind.from_pretrained(folder, output_loading_info=True)
    if odd := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise WorkError(f"{folder}: transformers does not find the weights of {odd[0]}")
    loaded = loaded.float().eval()
    if is_reward:
        return loaded(input_ids=ids, prompt_lengths=_prompt_lengths(ids)).logits[:, 0]
    return loaded(input_ids=ids, use_cache=False).logits


def gptj_logits(folder: Path, config: ModelConfig, ids: Tensor) -> tuple[Tensor, str] | None:
    """Logits of a GPT-J folder by transformers, and its version.

    None where transformers is not installed, or the model is too large to load for a comparison.
    """
    if 4 * config.parameters > _MAX_COMPARED_BYTES or find_spec("transformers") is None:
        return None
    transformers = import_module("transformers")
    with _quiet_transformers(), torch.no_grad():
        model = transformers.GPTJForCausalLM.from_pretrained(folder).float().eval()
        return model(input_ids=ids, use_cache=False).logits, transformers.__version__


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

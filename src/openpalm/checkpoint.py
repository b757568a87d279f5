"""The checkpoint directory, the only format inside the house: save, load, verify, latest.

    step-00002000/
      config.json  tokenizer.json  model.safetensors  fingerprint.safetensors  card.md
      adapter/         where one is attached: its factors once more, as PEFT lays them out
      train/           optimizer and random state as tensors (DCP), the rest as state.json
      manifest.json    written last: every file's size and hash, its own hash, lineage

A directory is written beside its final name and renamed, so it is whole or absent. Nothing is
loaded from one whose files differ from its manifest, and loading never runs code from a file.
Deleting `train/` publishes a model.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from openpalm import __version__, adapter, tensor_store
from openpalm.errors import CheckpointError, SettingsError, StorageError
from openpalm.json_file import read_json
from openpalm.model import lora
from openpalm.model.config import LoraConfig, ModelConfig, config_from_json, lora_from_json
from openpalm.model.transformer import Transformer

FORMAT = "openpalm-checkpoint"
VERSION = 1
FINGERPRINT_TOKENS = 16
FINGERPRINT_TOLERANCE = 1e-4
_STEP = re.compile(r"step-(\d{8,})")
_REMEDY = "take an older checkpoint or another copy"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainState:
    """What a run needs, beside the weights, to go on as if it had never stopped."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    """JSON-able"""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    directory: Path,
    model: Transformer,
    *,
    tokenizer_json: str | None = None,
    train: TrainState | None = None,
    lineage: dict[str, Any] | None = None,
    fingerprint: bool = False,
    card: str | None = None,
) -> None:
    """Writes a checkpoint directory, whole or not at all; an older one of that name is replaced.

    Raises StorageError when the disk is full or refuses; nothing half-written is left.
    """
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    old = partial.with_suffix(".old")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had our number
        partial.mkdir(parents=True)
        _write_contents(partial, model, tokenizer_json, train, fingerprint, card)
        _write_manifest(partial, lineage or {})
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        partial.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = tensor_store.cause(error)
        if refused := _refusal(cause):
            raise StorageError(f"{directory}: cannot be saved ({refused})") from error
        raise cause from None


def load(path: str | Path, device: str = "cpu", dtype: str = "float32") -> Transformer:
    """The model of a checkpoint or of a run's newest whole checkpoint, in eval mode.

    Every file is checked against the manifest first, and in float32 the fingerprint, where there
    is one, against what this code computes. Raises CheckpointError naming the path and reason.
    """
    directory = resolve(path)
    if dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    model = Transformer(load_config(directory)).to(device=device, dtype=DTYPES[dtype])
    load_weights(model, directory)
    model.eval()
    if dtype == "float32":
        _check_fingerprint(model, directory)
    return model


def load_config(directory: Path) -> ModelConfig:
    """The model's config, cheap: no weight is read."""
    return _load_configs(directory)[0]


def _load_configs(directory: Path) -> tuple[ModelConfig, LoraConfig | None]:
    """Of the model, and of the adapter where one is attached."""
    where = directory / "config.json"
    content = read_json(where, _REMEDY)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(f"{where}: not a config.json of this version; see `openpalm convert`")
    try:
        config = config_from_json(content.get("model"), str(where))
        low_rank = lora_from_json(content["lora"], str(where)) if "lora" in content else None
        if low_rank is not None:
            low_rank.check(config)
    except SettingsError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    _check_tensors(config, low_rank, directory)
    return config, low_rank


@torch.no_grad()
def load_weights(model: Transformer, directory: Path) -> None:
    """Fills `model` from the directory; its dtype and device stay the model's own.

    A model without an adapter gets the one that the checkpoint has.
    """
    low_rank = _load_configs(directory)[1]
    if low_rank is not None and not lora.is_attached(model):
        lora.attach(model, low_rank)
    if lora.config_of(model) != low_rank:
        raise CheckpointError(f"{directory}: has not the adapter that this model has")
    with safetensors.safe_open(directory / "model.safetensors", framework="pt") as file:
        for name, parameter in model.named_parameters():
            stored = file.get_tensor(name)
            if stored.shape != parameter.shape:
                raise CheckpointError(
                    f"{directory}: {name} is {list(stored.shape)}, this model needs "
                    f"{list(parameter.shape)}; it is a checkpoint of another model"
                )
            parameter.copy_(stored)


def load_train_state(directory: Path) -> TrainState:
    """What `save` was given as `train`. Raises CheckpointError if it was published without."""
    folder = directory / "train"
    if not folder.is_dir():
        raise CheckpointError(f"{directory}: holds no train/ to resume; start from it with --init")
    tensors = tensor_store.read(folder)
    return TrainState(tensors, read_json(folder / "state.json", _REMEDY))


def resolve(path: str | Path) -> Path:
    """The checkpoint directory that `path`, a checkpoint or a run, stands for; verified whole."""
    path = Path(path)
    try:
        there = path.exists()
    except OSError as error:  # a name too long
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not there:
        raise CheckpointError(f"{path}: no such checkpoint or run; check the path")
    if (path / "checkpoints").is_dir():
        found = latest(path)
        if found is None:
            raise CheckpointError(f"{path}: this run has no whole checkpoint yet")
        return found
    if not (path / "manifest.json").is_file():
        raise CheckpointError(
            f"{path}: not a checkpoint of OpenPaLM (no manifest.json); "
            "foreign ones are read by `openpalm convert`"
        )
    verify(path)
    return path


def latest(run: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole checkpoint of a run, or None; says which newer ones it passed over."""
    say = say or (lambda line: print(line, file=sys.stderr))
    for directory in reversed(steps(run)):
        try:
            verify(directory)
            return directory
        except CheckpointError as error:
            say(f"passing over a damaged checkpoint: {error}")
    return None


def steps(run: Path) -> list[Path]:
    """The run's checkpoint directories, oldest first, damaged ones included."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_partial(run: Path) -> None:
    """Clears what a killed save left; only for the process that owns the run."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, after checking every file's size and hash against it.

    A missing `train/` is a published model, not damage. Raises CheckpointError naming the file.
    """
    manifest = read_manifest(directory)
    published = not (directory / "train").exists()
    files = {
        name: entry
        for name, entry in manifest["files"].items()
        if not (published and name.startswith("train/"))
    }
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory}: {name} is missing; {_REMEDY}")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{directory}: {name} is torn ({size} bytes); {_REMEDY}")
    try:
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(lambda name: _hash(directory / name), files))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error})") from None
    for (name, entry), found in zip(files.items(), hashes, strict=True):
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{directory}: {name} was altered since it was written; {_REMEDY}"
            )
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest alone, its own hash checked, no file compared with it."""
    where = directory / "manifest.json"
    manifest = read_json(where, _REMEDY)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(f"{where}: not of a checkpoint that this version reads; check PATH")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if where.read_bytes() != _manifest_text(body).encode():
        raise CheckpointError(f"{where}: was altered since it was written; {_REMEDY}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        raise CheckpointError(f"{where}: its list of files is not one this project writes")
    return manifest


def _is_entry(name: str, entry: object) -> bool:
    inside = not name.startswith("/") and ".." not in Path(name).parts
    return inside and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def tokenizer_json(directory: Path) -> str | None:
    """The checkpoint's tokenizer.json as text, or None where it has none."""
    file = directory / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def fingerprint_logits(model: Transformer) -> tuple[Tensor, Tensor]:
    """16 fixed tokens [1, 16] and their float32 logits [1, 16, vocab_size]."""
    vocab = model.config.vocab_size
    tokens = torch.arange(FINGERPRINT_TOKENS, device=model.embedding.device)[None] * 7919 % vocab
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model.logits(tokens)
    model.train(training)
    return tokens, logits


def _check_fingerprint(model: Transformer, directory: Path) -> None:
    file = directory / "fingerprint.safetensors"
    if not file.is_file():
        return
    try:
        written = safetensors.torch.load_file(file).get("logits")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    computed = fingerprint_logits(model)[1].cpu()
    if written is None or written.shape != computed.shape:
        raise CheckpointError(f"{directory}: its fingerprint is of another model")
    difference = (written - computed).abs().max().item()
    if not difference <= FINGERPRINT_TOLERANCE * max(1.0, written.abs().max().item()):
        raise CheckpointError(
            f"{directory}: computes other logits than when it was written "
            f"(difference {difference:.1e}); the file or the code has changed"
        )


def _check_tensors(config: ModelConfig, low_rank: LoraConfig | None, directory: Path) -> None:
    """The stored names and shapes against the config's, so that a hostile size builds no model."""
    where = directory / "model.safetensors"
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            stored = {n: tuple(file.get_slice(n).get_shape()) for n in list(file.keys())}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{where}: cannot be read ({error})") from None
    numbers = sum(math.prod(shape) for shape in stored.values())
    parameters = config.parameters + (low_rank.parameters(config) if low_rank else 0)
    if config.depth > len(stored) or parameters > numbers:
        raise CheckpointError(
            f"{where}: holds {len(stored)} tensors of {numbers:,} numbers, too few for its "
            f"config.json ({config.depth} blocks, {parameters:,} parameters)"
        )
    with torch.device("meta"):
        model = Transformer(config)
        if low_rank is not None:
            lora.attach(model, low_rank)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    odd = {name for name, _ in stored.items() ^ wanted.items()}
    if odd:
        raise CheckpointError(f"{where}: a checkpoint of another model (differs in {min(odd)})")


def _write_contents(
    partial: Path,
    model: Transformer,
    tokenizer: str | None,
    train: TrainState | None,
    fingerprint: bool,
    card: str | None,
) -> None:
    config = {"format": FORMAT, "version": VERSION, "model": asdict(model.config)}
    low_rank = lora.config_of(model)
    if low_rank is not None:
        config["lora"] = asdict(low_rank)
        adapter.write(partial / "adapter", model)
    _write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    safetensors.torch.save_file(weights, partial / "model.safetensors")
    if tokenizer is not None:
        _write_text(partial / "tokenizer.json", tokenizer)
    if fingerprint:
        tokens, logits = fingerprint_logits(model)
        pair = {"tokens": tokens.cpu(), "logits": logits.cpu().contiguous()}
        safetensors.torch.save_file(pair, partial / "fingerprint.safetensors")
    if train is not None:
        (partial / "train").mkdir()
        tensor_store.write(partial / "train", train.tensors)
        _write_text(partial / "train" / "state.json", json.dumps(train.values, indent=1) + "\n")
    _write_text(partial / "card.md", card or default_card(model.config))


def _write_manifest(partial: Path, lineage: dict[str, Any]) -> None:
    files = {}
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        file.chmod(0o644)  # safetensors writes files for the owner only
        _sync(file)
        name = file.relative_to(partial).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
    versions = {"openpalm": __version__, "torch": torch.__version__}
    body = {"format": FORMAT, "version": VERSION, "files": files}
    body |= {"lineage": lineage, "versions": versions}
    _write_text(partial / "manifest.json", _manifest_text(body))
    _sync(partial / "manifest.json")
    for folder in (partial / "train", partial / "adapter", partial):
        if folder.is_dir():
            _sync(folder)


def default_card(config: ModelConfig) -> str:
    """A model card that says what can be known from the config alone."""
    return (
        "# Model card\n\n"
        f"A PaLM-style language model of {config.parameters:,} parameters made with OpenPaLM "
        f"{__version__}.\n\n"
        f"| | |\n|---|---|\n| width x depth | {config.dim} x {config.depth} |\n"
        f"| heads | {config.heads} of {config.head_dim}, {config.kv_heads} key/value |\n"
        f"| context | {config.context} tokens |\n| vocabulary | {config.vocab_size} |\n\n"
        "Where it came from is in manifest.json under `lineage`.\n"
        "It repeats what its data says, true or not; look at its answers before relying on one.\n"
    )


def _refusal(error: BaseException) -> str | None:
    """Why the system refused a write, if that is what the error says."""
    if isinstance(error, OSError):
        return error.strerror
    if said := re.search(r"os error (\d+)", str(error)):  # safetensors
        return os.strerror(int(said[1]))
    if re.search("PytorchStreamWriter|unexpected pos", str(error)):  # torch.save on a full disk
        return os.strerror(errno.ENOSPC)
    return None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_text(body: dict[str, Any]) -> str:
    """The manifest to the last byte: its body and the body's own hash."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1) + "\n"


def _sync(path: Path) -> None:
    """fsync of a file or a directory, so that a rename never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

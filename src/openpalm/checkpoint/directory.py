"""The checkpoint directory: save, load, resume state, and the newest checkpoint of a run.

    step-00002000/
      config.json  tokenizer.json  model.safetensors  fingerprint.safetensors  card.md
      adapter/         a copy of the LoRA adapter in PEFT's layout, if the model has one
      train/           optimizer state in state.safetensors, the rest in state.json
      manifest.json    written last: size and hash of every file, its own hash, lineage

A directory is written under a temporary name and renamed, so it is complete or absent. A file is
used only if the manifest lists it and its hash agrees; train/ is hashed only to resume a run.
Loading never runs code from a file. Deleting `train/` publishes a model.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpalm import __version__
from openpalm.base.console import shown
from openpalm.base.json_file import read_failure, read_json
from openpalm.checkpoint import fingerprint, tensors
from openpalm.checkpoint.contents import (
    STATE,
    Contents,
    TrainState,
    collect,
    complete_or_absent,
    config_text,
    default_card,
)
from openpalm.checkpoint.lazy_state import LazyState
from openpalm.checkpoint.manifest import (
    REMEDY,
    WEIGHTS,
    file_size,
    is_listed,
    read_manifest,
    verify,
)
from openpalm.checkpoint.stored_config import load_configs
from openpalm.checkpoint.streamed_logits import streamed_logits
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model import lora
from openpalm.model.config import (
    LoraConfig,
    ModelConfig,
    RewardConfig,
)
from openpalm.model.reward import make_model
from openpalm.model.sharding import assign, local_part, local_slices
from openpalm.model.transformer import Transformer

BEST = "best"
"""Link in a run's checkpoints/ to its best checkpoint (--keep-best)."""
_STEP = re.compile(r"step-(\d{8,})")
_STEPPED = ("optimizer/", "model/")
"""Prefixes of state that must be finite: optimizer moments, weights that only training needs."""
HEADS = ("reward_head", "reward_bias", "marks")
"""Parameters of a reward model that a language model does not have."""
_DAMAGED = "passing over a damaged checkpoint: "

Allow = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """Writes a complete checkpoint directory and replaces an older one of that name.

    Raises StorageError when the disk is full or refuses; then nothing new is left behind.
    """
    with complete_or_absent(directory, lineage) as partial:
        collect(
            model,
            tokenizer_json=tokenizer_json,
            train=train,
            with_fingerprint=fingerprint,
            card=card,
            parent=(lineage or {}).get("parent"),
        ).write(partial)


def save_one_by_one(
    directory: Path,
    config: ModelConfig,
    weights: LazyState,
    *,
    optimizer: LazyState | None = None,
    tokenizer_json: str | None = None,
    lineage: dict[str, Any] | None = None,
) -> Tensor:
    """As `save`, for a model larger than memory: holds one block at a time. Returns the logits of
    the fingerprint, computed from the weights that were written.

    optimizer: AdamW's state as Optimizer.state_tensors names it, for `--keep-optimizer`.
    """
    with complete_or_absent(directory, lineage) as partial:
        texts = {"config.json": config_text(config), "card.md": default_card(config)}
        if tokenizer_json is not None:
            texts["tokenizer.json"] = tokenizer_json
        ids = fingerprint.fixed_tokens(config)
        # Reading is slow (arrays of shards are joined), so one pass computes and writes.
        with tensors.filled(partial / WEIGHTS, weights.layout) as put:
            logits = streamed_logits(config, weights.copied_to(put), ids)
        tensors.write(partial / fingerprint.FILE, {"tokens": ids, "logits": logits})
        if optimizer is not None:
            (partial / "train").mkdir()
            layout = {f"optimizer/{name}": entry for name, entry in optimizer.layout.items()}
            with tensors.filled(partial / STATE[0], layout) as put:
                for name in optimizer:
                    put(f"optimizer/{name}", optimizer[name])
            texts[STATE[1]] = json.dumps({"optimizer": "adamw"}) + "\n"
        Contents(texts).write(partial)
    return logits


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    allow: Allow | None = None,
) -> Transformer:
    """Loads the model of a checkpoint, or of a run's newest complete checkpoint, in eval mode.

    Returns a RewardModel if config.json has a "reward" object. Checks every file outside train/
    against the manifest and, in float32, the stored fingerprint against the loaded model. Raises
    CheckpointError with path and reason. Weights that are not finite are an error too, unless
    `allow` is given, which then gets the message.
    """
    directory = resolve(path)
    if dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    configs = load_configs(directory)
    with torch.device("meta"):
        model = make_model(configs.model, configs.reward).to(DTYPES[dtype])
    model.to_empty(device=device)
    load_weights(model, directory, allow=allow)
    model.eval()
    if dtype == "float32" and is_listed(directory, fingerprint.FILE):
        fingerprint.check(model, directory / fingerprint.FILE)
    return model


def load_config(directory: Path) -> ModelConfig:
    """The model's config; reads no weights."""
    return load_configs(directory).model


def load_reward_config(directory: Path) -> RewardConfig | None:
    """The config of a reward model, or None for a language model."""
    return load_configs(directory).reward


def check_generates_text(directory: Path) -> None:
    """Raises CheckpointError for a reward model, which scores completions and generates none."""
    if load_reward_config(directory) is not None:
        raise CheckpointError(
            f"{directory}: is a reward model, which scores completions and generates none; "
            "take the checkpoint of a language model"
        )


@torch.no_grad()
def load_weights(model: Transformer, directory: Path, *, allow: Allow | None = None) -> None:
    """Copies the checkpoint's weights into `model`, which keeps its dtype and device.

    A model without an adapter gets the checkpoint's adapter. Raises CheckpointError if the weights
    fit another model, or are not finite unless `allow` is given, which then gets the message.
    """
    low_rank = load_configs(directory).lora
    if low_rank is not None and not lora.is_attached(model):
        lora.attach(model, low_rank)
    if lora.config_of(model) != low_rank:
        raise CheckpointError(f"{directory}: its adapter differs from this model's")
    for name, parameter in model.published_parameters():
        _load_parameter(directory, name, parameter, allow)


@torch.no_grad()
def load_merged(model: Transformer, directory: Path) -> None:
    """`load_weights`, with the checkpoint's adapter merged, for a run that starts from it.

    An adapter of the model's own, and heads that the checkpoint does not have, stay as they are.
    """
    low_rank = load_configs(directory).lora
    with tensors.opened(directory / WEIGHTS) as file:
        stored = file.shapes().keys()
    own = dict(model.published_parameters())
    trunk = {name for name in own if not name.startswith(HEADS) and ".lora." not in name}
    if missing := trunk - stored:
        raise CheckpointError(f"{directory}: holds no {min(missing)}; {REMEDY}")
    for name, parameter in own.items():
        if ".lora." in name or name not in stored:
            continue
        targets = () if low_rank is None else _adapted_by(name, low_rank)
        if not targets:
            _load_parameter(directory, name, parameter, None)
            continue
        assert low_rank is not None
        with tensors.opened(directory / WEIGHTS) as file:
            matrix, prefix = file.finite(name).clone(), name.rpartition(".")[0]
            for target in targets:
                rows = matrix.chunk(2)["kv".index(target)] if target in ("k", "v") else matrix
                a, b = (file.finite(f"{prefix}.lora.{target}.{factor}") for factor in "ab")
                rows.addmm_(b, a, alpha=low_rank.scale)
        assign(parameter, matrix)


def _adapted_by(name: str, low_rank: LoraConfig) -> tuple[str, ...]:
    """The adapter's targets in the matrix of that name."""
    matrix = name.rpartition(".")[2]
    inside = ("k", "v") if matrix == "kv" else (matrix,)
    return tuple(target for target in inside if target in low_rank.targets and ".project_" in name)


def _load_parameter(directory: Path, name: str, parameter: Tensor, allow: Allow | None) -> None:
    """Reads this process's part of a parameter."""
    # Opened for each tensor: pages of the file that stay mapped would count as memory.
    with tensors.opened(directory / WEIGHTS) as file:
        if (stored := file.shape(name)) != tuple(parameter.shape):
            raise CheckpointError(
                f"{directory}: {name} is {list(stored)}, this model needs "
                f"{list(parameter.shape)}; it is a checkpoint of another model"
            )
        local_part(parameter).copy_(file.finite(name, allow, local_slices(parameter)))


def load_train_state(directory: Path, *, checked: bool = False) -> TrainState:
    """Loads the state to resume from, the `train` argument of `save`.

    checked: another process has called `check_train_state`; the tensors are read when they are
    used, so that each process reads its part. Raises CheckpointError if the checkpoint was
    published without it, or if the optimizer state or a weight in it is not finite. Raises
    SettingsError if another version wrote it in a format that this version does not read.
    """
    folder = directory / "train"
    if not folder.is_dir():
        raise CheckpointError(f"{directory}: holds no train/ to resume; start from it with --init")
    if not checked:
        check_train_state(directory)
    state: Mapping[str, Tensor] = tensors.StoredTensors(directory / STATE[0])
    if not checked:
        state = {name: tensor.clone() for name, tensor in state.items()}
    return TrainState(state, read_json(directory / STATE[1], REMEDY))


def check_train_state(directory: Path) -> None:
    """Raises what `load_train_state` raises; holds one tensor at a time."""
    files = verify(directory)["files"]
    refuse_other_version(directory)
    if missing := set(STATE) - files.keys():
        raise CheckpointError(f"{directory}: its manifest lists no {min(missing)}; {REMEDY}")
    for name, tensor in tensors.StoredTensors(directory / STATE[0]).items():
        if name.startswith(_STEPPED):
            tensors.check_finite(directory / "train", {name: tensor})


def optimizer_name(directory: Path) -> str | None:
    """The optimizer of which train/ holds the state; None if there is none, or it is not named."""
    manifest = read_manifest(directory)
    if file_size(directory / STATE[1]) is None or not {*STATE} <= manifest["files"].keys():
        return None
    name = read_json(directory / STATE[1], REMEDY).get("optimizer")
    if name is None:  # version 0.2.0 and older named it in the lineage only
        settings = manifest["lineage"].get("settings") or {}
        name = settings.get("optim", {}).get("name")
    return name if isinstance(name, str) else None


def refuse_other_version(directory: Path) -> None:
    """Raises SettingsError if another version wrote a train/ that this version cannot read."""
    manifest = read_manifest(directory)
    versions = manifest.get("versions")
    made = versions.get("openpalm") if isinstance(versions, dict) else None
    if made != __version__ and STATE[0] not in manifest["files"]:
        raise SettingsError(
            f"{directory}: was written by OpenPaLM {shown(str(made))} and cannot be resumed by "
            f"{__version__}; resume it with that version, or start from its weights with --init"
        )


def resolve(path: str | Path, *, training: bool = False) -> Path:
    """The verified checkpoint directory for `path`, a checkpoint or a run (its newest checkpoint).

    train/ is verified only with `training`. Raises CheckpointError if there is no complete
    checkpoint, StorageError if the system cannot read one.
    """
    path = Path(path)
    if path.is_symlink() and path.name == BEST:
        # Followed once: a run that is still training may point the link to another checkpoint.
        path = path.parent / path.readlink()
    if file_size(path) is None:
        raise CheckpointError(f"{path}: no such checkpoint or run; check the path")
    if (path / "checkpoints").is_dir():
        found = newest_whole(path, training=training)
        if found is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet; let it train longer")
        return found
    if not (path / "manifest.json").is_file():
        raise CheckpointError(
            f"{path}: not a checkpoint of OpenPaLM (no manifest.json); "
            "foreign ones are read by `openpalm convert`"
        )
    verify(path, training=training)
    return path


def latest(
    run: Path, say: Callable[[str], None] | None = None, *, training: bool = False
) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Reports damaged newer ones through `say`, by default on stderr. train/ is verified only with
    `training`. Raises StorageError if the system cannot read a file: an unreadable checkpoint may
    be complete, so no older one replaces it.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    for directory in reversed(steps(run)):
        try:
            verify(directory, training=training)
            return directory
        except CheckpointError as error:
            say(f"{_DAMAGED}{error}")
    return None


def newest_whole(run: Path, *, training: bool = False) -> Path | None:
    """`latest`, but a run of which every checkpoint is damaged raises CheckpointError.

    It is not the same as a run without a checkpoint: beginning it again would overwrite files that
    may still be restored.
    """
    lines: list[str] = []
    found = latest(run, say=lines.append, training=training)
    if found is None and lines:
        reason = lines[0].removeprefix(_DAMAGED).removesuffix(f"; {REMEDY}")
        all_of = "its one checkpoint is" if len(lines) == 1 else f"its {len(lines)} checkpoints are"
        raise CheckpointError(
            f"{run}: {all_of} damaged ({reason}); restore one from a copy, or train again with "
            "another --out"
        )
    for line in lines:
        print(line, file=sys.stderr)
    return found


def steps(run: Path) -> list[Path]:
    """The run's checkpoint directories, oldest first, damaged ones included."""
    folder = run / "checkpoints"
    try:  # iterdir, because Path.glob finds nothing in a folder that cannot be read
        found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise read_failure(folder, error) from None
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_partial(run: Path) -> None:
    """Deletes the leftovers of a killed save; only for the process that holds the run's lock."""
    folder = run / "checkpoints"
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(f".{BEST}.*"):
        leftover.unlink(missing_ok=True)


def tokenizer_json(directory: Path) -> str | None:
    """The text of the checkpoint's tokenizer.json, or None if its manifest lists none."""
    if not is_listed(directory, "tokenizer.json"):
        return None
    return (directory / "tokenizer.json").read_text(encoding="utf-8")

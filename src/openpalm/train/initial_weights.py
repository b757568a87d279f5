"""Initial weights of a run: new weights of a preset, or those of a checkpoint (--init)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from openpalm.base.settings import plain, spell
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, SettingsError, count_of
from openpalm.model import lora
from openpalm.model.config import PRESETS, ModelConfig, Preset, RewardConfig, preset
from openpalm.model.transformer import Transformer, initialise
from openpalm.parallel.world import world
from openpalm.train.config import TrainSettings
from openpalm.train.sizing.scaling import of_depth

SIZES = ("dim", "depth", "heads", "head_dim", "ff_dim", "kv_heads")
"""Fields of the config that the shapes of the weights determine."""
MAX_PADDING = 256
"""ids that a vocabulary may have beyond its tokenizer's, from rounding up to a multiple"""


@dataclass(frozen=True)
class Start:
    """A model's config, its initial weights, and a learning rate that suits its size."""

    config: ModelConfig
    fill: Callable[[Transformer], None]
    learning_rate: float
    parent: Path | None = None
    """the checkpoint that --init names"""
    parent_hash: str | None = None
    reward: RewardConfig | None = None
    """config of the heads, if --init is a reward model"""
    unsure: str | None = None
    """a warning, if the model may have been trained with another tokenizer"""


def starting_point(
    settings: TrainSettings,
    init: Path | None,
    tokenizer: Tokenizer,
    *,
    may_score: bool = False,
    force: bool = False,
) -> Start:
    """The start that `--model` or `--init` names; `init` is the path of --init.

    `may_score` allows a reward model, `force` data of another tokenizer. Raises SettingsError for
    an unknown preset, CheckpointError if the checkpoint has other sizes or another tokenizer.
    """
    if init is None:
        named = _named(settings)
        config = _changed(named.config, settings, vocab_size=tokenizer.vocab_size)
        init_as = settings.arch.init or "default"
        if init_as == "palm" and config.tied:  # an untied head is a matrix like any other
            config = dataclasses.replace(config, logit_scale=config.dim**-0.5)
        return Start(
            config,
            lambda model: initialise(model, settings.seed, init_as),
            named.learning_rate,
        )
    if settings.arch.init is not None:
        raise SettingsError(
            f"--arch.init {settings.arch.init}: --init brings weights of its own; leave one out"
        )
    directory = start_directory(init)
    if not may_score:
        checkpoint.check_generates_text(directory)
    unnamed = checkpoint.tokenizer_json(directory) is None
    its_own = "the model's tokenizer" if unnamed else f"--tokenizer {directory / 'tokenizer.json'}"
    remedy = f"prepare the data with {its_own}"
    unsure = check_reads(directory, tokenizer, remedy, force=force)
    if unnamed and not unsure:
        unsure = f"{directory}: has no tokenizer of its own; the data's is taken to be the one"
    stored = checkpoint.load_config(directory)
    config = _changed(stored, settings)
    for name in (*SIZES, "qk_norm", "rotary_dims"):
        # 0 and all dimensions of a head are the same.
        kept = "rotated" if name == "rotary_dims" else name
        if getattr(config, kept) != getattr(stored, kept):
            raise CheckpointError(
                f"{directory}: has {name} {getattr(stored, name)}, which its weights fix; "
                f"leave {spell('arch.' + name)} out"
            )
    if settings.model is not None:
        wanted = _changed(preset(settings.model).config, settings, vocab_size=stored.vocab_size)
        _same_sizes(directory, stored, wanted, settings.model)
    return Start(
        config,
        lambda model: checkpoint.load_merged(model, directory),
        _learning_rate_of_size(config),
        directory,
        read_manifest(directory)["sha256"],
        checkpoint.load_reward_config(directory),
        unsure,
    )


def start_directory(init: Path) -> Path:
    """The checkpoint that a run starts from, the same on all its processes.

    A run that is still training may save another one while they look for the newest.
    """
    return world().on_main(lambda: checkpoint.resolve(init))


def _named(settings: TrainSettings) -> Preset:
    """The preset that --depth or --model names."""
    if settings.scaling_depth is not None:
        return of_depth(settings.scaling_depth)
    assert settings.model is not None
    return preset(settings.model)


def check_trained(settings: TrainSettings, config: ModelConfig) -> None:
    """Raises SettingsError if --lora or --last-layers does not fit the model."""
    settings.lora.config(config)
    if settings.last_layers is not None and settings.last_layers > config.depth:
        raise SettingsError(
            f"--last-layers {settings.last_layers}: the model has "
            f"{count_of(config.depth, 'block')}; take fewer, or leave it out to train everything"
        )


def unfilled(make_model: Callable[[], Transformer], settings: TrainSettings) -> Transformer:
    """The run's model without values, on the meta device, with its adapter and what it freezes."""
    with torch.device("meta"):
        model = make_model()
    choose_trained(model, settings)
    return model


def choose_trained(model: Transformer, settings: TrainSettings) -> None:
    """Attaches the adapter, or freezes all but the last blocks and the final norm.

    The adapter is uninitialised: see `lora.initialise_adapter`.
    """
    config = settings.lora.config(model.config)
    if config is not None:
        lora.attach(model, config)
    elif settings.last_layers is not None:
        for parameter in lora.trunk(model):
            parameter.requires_grad_(False)
        for part in (*model.blocks[-settings.last_layers :], model.norm):
            part.requires_grad_(True)


def _changed(
    config: ModelConfig, settings: TrainSettings, vocab_size: int | None = None
) -> ModelConfig:
    changes = plain(settings.arch)
    changes.pop("init", None)  # how weights are initialised is not part of the config
    if vocab_size is not None:
        changes["vocab_size"] = vocab_size
        changes["context"] = settings.sequence_length or config.context
    return dataclasses.replace(config, **changes)


def check_reads(
    directory: Path, tokenizer: Tokenizer, remedy: str, *, force: bool = False
) -> str | None:
    """Raises CheckpointError unless the checkpoint's model was trained with this tokenizer.

    `force` accepts another tokenizer unless it has too many ids; returns a warning then, or None.
    """
    ids = checkpoint.load_config(directory).vocab_size
    has = f"its vocabulary has {ids} ids, this tokenizer {tokenizer.vocab_size}"
    if ids < tokenizer.vocab_size:
        raise CheckpointError(f"{directory}: {has}; {remedy}")
    if checkpoint.tokenizer_json(directory) is None:
        fits = ids - tokenizer.vocab_size <= MAX_PADDING
        unsure = f"the checkpoint has no tokenizer of its own; {has}"
    else:
        own = Tokenizer.load(directory / "tokenizer.json")
        fits = own.digest == tokenizer.digest
        unsure = "its own tokenizer.json is another tokenizer than this one"
    if fits:
        return None
    if not force:
        raise CheckpointError(f"{directory}: {unsure}; {remedy}, or add --force to use it anyway")
    return f"{directory}: {unsure}; used anyway (--force)"


def _same_sizes(directory: Path, stored: ModelConfig, wanted: ModelConfig, name: str) -> None:
    for size in SIZES:
        has, needs = getattr(stored, size), getattr(wanted, size)
        if has != needs:
            raise CheckpointError(
                f"{directory}: a checkpoint of another model than {name} "
                f"({size} {has}, not {needs}); leave --model out to take the checkpoint's"
            )


def _learning_rate_of_size(config: ModelConfig) -> float:
    """A third of the nearest preset's rate, because the weights are already trained."""
    nearest = min(PRESETS.values(), key=lambda p: abs(p.config.parameters - config.parameters))
    return nearest.learning_rate / 3

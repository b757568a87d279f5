"""What several verbs share: weights and tokenizers from names, held-out rows, warnings."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from openpalm import __version__
from openpalm.base.device import pick_device, pick_dtype
from openpalm.base.files import sha256_of
from openpalm.base.settings import check, plain, spell
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_adapter
from openpalm.checkpoint.manifest import is_listed, read_manifest
from openpalm.cli.model_options import BaseModelOptions, ModelOptions
from openpalm.convert.cached import checkpoint_path
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.tokenizer import Tokenizer, is_bpe
from openpalm.errors import CheckpointError, SettingsError
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
from openpalm.generate.engine import Engine
from openpalm.generate.load import load_quantized
from openpalm.generate.quantize import WeightFormat
from openpalm.model.config import LoraConfig
from openpalm.model.transformer import Transformer
from openpalm.parallel.agreement import refuse_differences
from openpalm.parallel.world import join, world
from openpalm.train.config import NO_INIT, TaskProbeSettings, TrainSettings
from openpalm.train.initial_weights import Start, check_reads, start_directory, starting_point
from openpalm.train.probes import Probe

if TYPE_CHECKING:
    from openpalm.train.spec import TrainSpec

T = TypeVar("T")
HELD_OUT_SHARE = 0.05
MAX_HELD_OUT = 64
OF_A_PROCESS = ("data", "loggers", "wandb_project", "wandb_name", "profile")
"""Settings that may differ between the processes of a run: the data is compared by its hash, the
others are for the main process."""


def join_processes(settings: TrainSettings) -> None:
    """Joins the processes that torchrun started, before any of them reads data.

    Raises SettingsError if they were started with different options or versions.
    """
    here = join(settings.parallel, pick_device(settings.device))
    versions = {"version of OpenPaLM": __version__, "version of PyTorch": str(torch.__version__)}
    options = {name: value for name, value in plain(settings).items() if name not in OF_A_PROCESS}
    refuse_differences(here, versions | {spell(name): value for name, value in options.items()})


def weights_path(name: str) -> Path:
    """A run, a checkpoint, a Hugging Face folder or a hub name as a path that `checkpoint.resolve`
    understands."""
    # One process downloads and converts it; the others then find it, each on its own machine.
    found = world().on_main(lambda: checkpoint_path(name))
    return found if world().is_main else checkpoint_path(name)


def tokenizer_of(directory: Path, given: Path | None = None) -> Tokenizer | None:
    """The tokenizer at `given`, else the checkpoint's own, else None.

    The files next to `given` name its end-of-text token, as for `data prepare`.
    """
    if given is not None:
        if is_bpe(str(given)):
            raise SettingsError(
                f"--tokenizer {given}: there is no text to train it on; give byte or a "
                "tokenizer.json"
            )
        return Tokenizer.from_spec(str(given), ())
    if checkpoint.tokenizer_json(directory) is None:
        return None
    return Tokenizer.load(directory / "tokenizer.json")


def fine_tuning_start(
    settings: TrainSettings, *, may_score: bool = False
) -> tuple[Path, Tokenizer, Start]:
    """The checkpoint that --init names, its tokenizer and its weights as a start.

    `may_score` allows a reward model.
    """
    if settings.init is None:
        raise SettingsError(NO_INIT)
    directory = start_directory(weights_path(settings.init))
    tokenizer = tokenizer_of(directory)
    if tokenizer is None:
        raise CheckpointError(
            f"{directory}: its manifest lists no tokenizer.json, so it cannot read text"
        )
    return directory, tokenizer, starting_point(settings, directory, tokenizer, may_score=may_score)


def held_out(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The training items, and the last items of a file, which are held out for evaluation."""
    kept = len(items) - min(MAX_HELD_OUT, int(HELD_OUT_SHARE * len(items)))
    return items[:kept], items[kept:]


def task_probes(
    settings: TaskProbeSettings, tokenizer: Tokenizer, *, chat: bool = False
) -> list[Probe]:
    """The probe of --eval-tasks, if it is given; the rows of the tasks are read now."""
    if settings.eval_tasks is None:
        return []
    from rich.console import Console

    from openpalm.evaluate.harness import check_installed
    from openpalm.evaluate.probes import task_probe
    from openpalm.evaluate.tasks import load_tasks, task_names

    check_installed("--eval-tasks")
    names = task_names(settings.eval_tasks)
    check(bool(names), "eval_tasks", repr(settings.eval_tasks), "names of tasks")
    with Console(stderr=True).status("reading the tasks (some seconds)"):
        tasks = load_tasks(
            names,
            settings.eval_tasks_path,
            shots=settings.eval_tasks_fewshot,
            limit=settings.eval_tasks_limit or None,
            chat=chat,
            code=settings.eval_tasks_code,
            code_option="--eval-tasks-code",
        )
    return [task_probe(tokenizer, tasks, every=settings.eval_tasks_every)]


def warn_of_memory(settings: TrainSettings, spec: "TrainSpec", *, frozen_copies: int = 0) -> None:
    """Warns on stderr if the run needs more memory than its device has, with what would help.

    `frozen_copies`: further models in memory, such as a reference policy.
    """
    from openpalm.base.device import free_memory
    from openpalm.plan.layouts import Layout
    from openpalm.plan.warning import planned, warn_if_too_large
    from openpalm.train.microbatches import batch_shape

    try:
        device = pick_device(settings.device)
        length = settings.sequence_length or spec.config.context
        here = join(settings.parallel, device)
        shape = spec.shape or batch_shape(settings, length, here.data_size)
        training = planned(settings, spec.config, shape, pick_dtype(settings.dtype, device))
    except SettingsError:  # the run refuses these settings, in its own order
        return
    training = replace(training, frozen_copies=frozen_copies)
    layout = Layout(*here.axes.sizes)
    available, cuda = free_memory(device), device.type == "cuda"
    said = warn_if_too_large(training, available, cuda=cuda, layout=layout)
    if said and here.is_main:
        print(fill(f"{spec.label}: warning: {said}", 98, break_on_hyphens=False), file=sys.stderr)


def report_unused(label: str, path: Path | str, given: ReadResult[T], what: str) -> ReadResult[T]:
    """Prints which rows of a file are left out, by reason, and which fields are not used.

    Raises DataError if no row is left.
    """
    given.refuse_empty(path, what)
    for line in given.report():
        print(f"{label}: {path}: {line}", file=sys.stderr)
    return given


def serving_engine(
    source: str,
    settings: ModelOptions,
    *,
    slots: int = 16,
    allow: Callable[[str], None] | None = None,
) -> tuple[Engine, Tokenizer]:
    """The engine and tokenizer of a run, checkpoint or hub name."""
    return serving_model(source, settings, slots=slots, allow=allow)[:2]


def serving_model(
    source: str,
    settings: ModelOptions,
    *,
    slots: int = 16,
    allow: Callable[[str], None] | None = None,
) -> tuple[Engine, Tokenizer, SamplingDefaults]:
    """The engine, the tokenizer and the default sampling settings of a run, checkpoint or hub name.

    The arguments are those of `load_to_serve`.
    """
    directory = checkpoint.resolve(weights_path(source), training=settings.verify)
    return load_to_serve(directory, settings, settings.adapter, slots=slots, allow=allow)


def load_to_serve(
    directory: Path,
    settings: BaseModelOptions,
    adapter: Path | None = None,
    *,
    slots: int,
    allow: Callable[[str], None] | None = None,
) -> tuple[Engine, Tokenizer, SamplingDefaults]:
    """The engine, the tokenizer and the default sampling settings of a checkpoint.

    The adapter is merged into the weights. Weights that are not finite raise CheckpointError; if
    `allow` is given it receives the message instead.
    """
    checkpoint.check_generates_text(directory)
    tokenizer = tokenizer_of(directory, settings.tokenizer)
    if tokenizer is None:
        raise CheckpointError(
            f"{directory}: its manifest lists no tokenizer.json; give one with --tokenizer"
        )
    if settings.tokenizer is not None:
        remedy = "give the model's own, or leave --tokenizer out"
        if forced := check_reads(directory, tokenizer, remedy, force=settings.force):
            print(f"openpalm: warning: {forced}", file=sys.stderr)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    if adapter is None and checkpoint.load_configs(directory).lora is None:
        weights = settings.quantize or cast(WeightFormat, dtype)
        model = load_quantized(directory, weights, str(device), allow=allow)
    else:  # an adapter is merged before quantizing, so the whole model is needed
        model = checkpoint.load(directory, str(device), dtype, allow=allow)
        give_adapter(model, adapter, directory, force=settings.force)
    engine = Engine(model, slots=slots, weights=settings.quantize, owned=True)
    return engine, tokenizer, sampling_defaults(directory)


def give_adapter(
    model: Transformer, path: Path | None, base: Path, *, force: bool = False
) -> str | None:
    """Attaches the adapter at `path` to the model of checkpoint `base`; returns its hash.

    `path` is an adapter directory, a checkpoint or a run. Raises CheckpointError for an adapter
    that was made for other weights; with `force` a warning is printed instead.
    """
    if path is None:
        return None
    directory, made_for = _find_adapter(path)
    allow = _forced if force else _refused
    bases = _equivalent_hashes(base)
    load_adapter(model, directory, bases=bases, made_for=made_for, allow=allow)
    return sha256_of(directory / WEIGHTS_FILE)


def adapter_factors(
    path: Path, base: Path, *, force: bool
) -> tuple[Path, LoraConfig, dict[str, Tensor]]:
    """The directory, the config and the factors of the adapter at `path` for checkpoint `base`.

    Raises CheckpointError as `give_adapter`, also if the checkpoint has an adapter of its own.
    """
    directory, made_for = _find_adapter(path)
    configs = checkpoint.load_configs(base)
    if configs.lora is not None:
        raise CheckpointError(
            f"{directory}: the model has an adapter already; fold it in with `openpalm merge-lora`"
        )
    allow = _forced if force else _refused
    bases = _equivalent_hashes(base)
    config, factors = read_adapter(
        configs.model, directory, bases=bases, made_for=made_for, allow=allow
    )
    return directory, config, factors


def _find_adapter(path: Path) -> tuple[Path, str | None]:
    """The adapter directory at `path`, and the manifest hash of its base if a manifest names it."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give an adapter, a run or a checkpoint")
    holder = path.parent if (path.parent / "manifest.json").is_file() else path
    made_for = None
    if (holder / "manifest.json").is_file() or (holder / "checkpoints").is_dir():
        holder = checkpoint.resolve(holder)
        path = holder / "adapter"
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not is_listed(holder, f"adapter/{name}"):
                raise CheckpointError(
                    f"{holder}: has no adapter (its manifest lists no adapter/{name})"
                )
        made_for = read_manifest(holder)["lineage"].get("parent")
    return path, made_for


def _forced(reason: str) -> None:
    print(f"--force: used anyway: {reason}", file=sys.stderr)


def _refused(reason: str) -> None:
    raise CheckpointError(f"{reason}; --force uses it anyway")


def _equivalent_hashes(directory: Path) -> set[str]:
    """Hashes of the checkpoint, and of its parent if it only merged the parent's adapter."""
    manifest = read_manifest(directory)
    lineage = manifest["lineage"]
    merged = {lineage["parent"]} if lineage.get("adapter") == "own" else set()
    return {manifest["sha256"]} | merged

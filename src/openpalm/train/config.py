"""Settings of a training run, validated when they are made; the field docstrings are the --help."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base.settings import NOT_AN_OPTION, check, spell
from openpalm.errors import SettingsError
from openpalm.parallel.config import ParallelSettings
from openpalm.train.batch_shape import Ramp
from openpalm.train.optimizer_settings import OptimSettings

if TYPE_CHECKING:
    from openpalm.model.config import LoraConfig, ModelConfig

PROBES_PER_RUN = 10
"""Default number of evaluations, and of checkpoints, per run."""
LEAST_STEPS_APART = 20
"""Default minimum of steps between two evaluations or two checkpoints."""

NO_INIT = (
    "--init is missing: name the run or checkpoint to fine-tune, such as --init runs/tiny; "
    "`openpalm train` makes one from text"
)


@dataclass(frozen=True)
class ArchSettings:
    """Changes to the preset's architecture; unset values keep the preset's."""

    init: Literal["default", "palm"] | None = None
    """initial weights; palm: embeddings of standard deviation 1, logits scaled by 1/sqrt(dim)"""
    dim: int | None = None
    """width of the residual stream"""
    depth: int | None = None
    """number of blocks"""
    heads: int | None = None
    """number of query heads"""
    head_dim: int | None = None
    """width of a head"""
    ff_dim: int | None = None
    """hidden width of the feed-forward layer"""
    kv_heads: int | None = None
    """number of key/value heads: 1 is multi-query attention, as many as heads multi-head"""
    rotary_dims: int | None = None
    """number of rotated dimensions at the start of each head (GPT-J: 64); 0 rotates all"""
    qk_norm: bool | None = None
    """QK norm: RMS norm on queries and keys"""
    xpos_base: float | None = None
    """xPos decay base, in positions (palm-rlhf-pytorch: 512); 0 is plain rotary embedding"""
    dropout: float | None = None
    """dropout probability on the output of each block"""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: a low-rank adapter, trained instead of the weights (Hu et al. 2021)."""

    rank: int = 0
    """rank of the adapter, usually 8 or 16; 0 trains the weights themselves"""
    alpha: float = 32.0
    """scale: the adapter's output is multiplied by alpha / rank; used only with --lora.rank above
    0"""
    targets: str = "all"
    """adapted matrices: all, or some of q,k,v,gate,up,out,down; used only with --lora.rank above
    0"""

    def __post_init__(self) -> None:
        # Not at the top: --help reads this module and needs no model.
        from openpalm.model.config import LORA_TARGETS

        check(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        check(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "above 0 and finite")
        known = self.targets == "all" or {*self._names} <= {*LORA_TARGETS}
        once = len({*self._names}) == len(self._names)
        wanted = f"all, or some of {','.join(LORA_TARGETS)}, each once"
        check(known and once, "lora.targets", self.targets, wanted)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.targets.split(","))

    def config(self, model: "ModelConfig") -> "LoraConfig | None":
        """The adapter of `model`, or None. Raises SettingsError if it does not fit the model.

        By default every matrix is adapted: queries and values alone, as in the paper, learn
        less (Dettmers et al. 2023, QLoRA, figure 2; Schulman et al. 2025, LoRA Without Regret).
        """
        from openpalm.model.config import LoraConfig

        if self.rank == 0:
            return None
        names = tuple(model.matrices) if self.targets == "all" else self._names
        config = LoraConfig(self.rank, self.alpha, names)
        config.check(model)
        return config


LOGGERS = ("tensorboard", "wandb")


def logger_names(loggers: str | None) -> list[str]:
    """The names in --loggers, each once."""
    return [] if loggers is None else [*dict.fromkeys(map(str.strip, loggers.split(",")))]


@dataclass(frozen=True)
class ProfileSettings:
    """Profiler trace of some steps, written to RUN/profile with the slowest operators."""

    steps: int | None = None
    """number of steps to trace, after three warm-up steps; default none"""

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, "profile.steps", self.steps, "1 or more")


@dataclass(frozen=True)
class MemorySettings:
    """Trades time for memory; the trained weights are the same."""

    recompute: Literal["none", "selective", "full", "offload"] = "none"
    """activations recomputed in the backward pass: none; selective, all but the outputs of large
    matrix multiplications; full, whole blocks; offload, full with the inputs of blocks in the
    CPU's memory"""
    loss_chunk: int | None = None
    """positions whose logits are in memory at once; default: as many as are fast"""
    offload_moments: bool = False
    """keep the optimizer's moments in the CPU's memory and copy them to the GPU for the update of
    each tensor; with --device cpu they are there anyway"""
    keep_freed: bool | None = None
    """keep freed memory in the process (Linux, glibc): faster steps, more memory; default: yes
    with --memory.recompute none"""

    @property
    def keeps_freed(self) -> bool:
        return self.recompute == "none" if self.keep_freed is None else self.keep_freed

    def __post_init__(self) -> None:
        chunk = self.loss_chunk
        check(chunk is None or chunk >= 1, "memory.loss_chunk", chunk, "1 or more")


@dataclass(frozen=True)
class TrainSettings:
    """Settings that every training run has."""

    data: Path
    """training data"""
    out: Path
    """run directory; the same command resumes a run that was interrupted"""
    model: str | None = None
    """size of the model, see `openpalm models`; with --init a check only: the checkpoint decides"""
    init: str | None = None
    """checkpoint, run or hub name to take the weights from; the optimizer starts new"""
    keep_optimizer: bool = False
    """with --init: the optimizer continues with the moments and step counts of that checkpoint"""
    steps: int | None = None
    """number of optimizer steps"""
    minutes: float | None = None
    """instead of --steps: time budget; a few steps are timed first to see how many fit"""
    epochs: float | None = None
    """instead of --steps: passes over the data"""
    seed: int = 0
    """random seed of the initial weights, the order of the data and dropout"""
    sequence_length: int | None = None
    """tokens per sequence; default: the preset's context"""
    batch_tokens: int | None = None
    """tokens per step, over all microbatches and processes; default: 16 sequences"""
    batch_ramp: str | None = None
    """smaller batches at the start: 1/4@0.1,1/2@0.3 takes a quarter of --batch-tokens for the
    first tenth of the steps and half until three tenths; default: whole batches"""
    microbatch_tokens: int = 8192
    """tokens per forward pass; a step accumulates the gradients of its microbatches"""
    save_every: int | None = None
    """steps between checkpoints; default: ten per run, at least 20 steps apart"""
    eval_every: int | None = None
    """steps between evaluations; default: ten per run, at least 20 steps apart"""
    keep_checkpoints: int = 3
    """number of newest checkpoints to keep; 0 keeps all"""
    keep_every: int | None = None
    """checkpoints at multiples of this many steps are saved and never removed"""
    keep_best: bool = False
    """keep the checkpoint with the best evaluation, too, and link checkpoints/best to it: the
    lowest val_loss, for ppo and grpo the highest val_gold or val_reward; an evaluation that
    improves it is saved"""
    device: str = "auto"
    """device: auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """number format of the arithmetic (weights stay float32); auto: the faster on this machine;
    float16, with loss scaling, is for GPUs without bfloat16 (V100, T4)"""
    max_skipped_steps: int = 10
    """the run stops after this many steps in a row with a loss or gradient that is not finite"""
    last_layers: int | None = None
    """train only this many of the last blocks, and the final norm; default: everything"""
    z_loss: float = 0.0
    """z-loss coefficient: log^2 Z times this is added to the loss (PaLM: 1e-4); keeps logits
    from drifting"""
    noise_scale: bool = False
    """also report the gradient noise scale (McCandlish et al. 2018), noise/b_simple: the batch, in
    tokens, above which a larger one brings little; noise/g and noise/s, and last_loss at the last
    position of the rows. It compares the gradients of microbatches, each summed over all processes,
    with that of the batch: needs two microbatches a step, memory for one more gradient, and a norm
    for each microbatch"""
    compile: bool = False
    """torch.compile of each block, for GPUs; takes a minute or two before the first step"""
    memory: MemorySettings = field(default_factory=MemorySettings)
    """memory"""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """processes: torchrun --nproc-per-node N -m openpalm VERB ...; they share the work"""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """low-rank adapter (LoRA) instead of the weights"""
    arch: ArchSettings = field(default_factory=ArchSettings)
    """changes to the architecture of --model; with --init the checkpoint decides all but xpos_base
    and dropout, and another value is refused"""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """optimizer and learning-rate schedule"""
    loggers: str | None = None
    """loggers that also receive the metrics: tensorboard, wandb, or both with a comma between"""
    wandb_project: str | None = None
    """project of --loggers wandb; default: WANDB_PROJECT, or openpalm"""
    wandb_name: str | None = None
    """name of the run for --loggers wandb; default: that of the run directory"""
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    """profiler"""
    config_file: Path | None = field(default=None, compare=False, metadata=NOT_AN_OPTION)
    """the file that --config named"""

    def __post_init__(self) -> None:
        # Not in OptimSettings: --depth derives values that are still unset.
        if self.scaling_depth is None:
            object.__setattr__(self, "optim", self.optim.resolved())
        if self.model is None and self.init is None and self.scaling_depth is None:
            raise SettingsError(self.no_model_message)
        if self.lengths != 1 and not (self.lengths == 0 and self.scaling_depth is not None):
            raise SettingsError("give exactly one of --steps, --minutes and --epochs")
        if self.keep_optimizer and self.init is None:
            raise SettingsError("--keep-optimizer: is for --init; leave it out")
        if self.keep_optimizer and self.lora.rank:
            raise SettingsError(
                "--keep-optimizer: a LoRA adapter starts new and has no moments; leave it or "
                "--lora.rank out"
            )
        if self.lora.rank and self.last_layers is not None:
            raise SettingsError("give --lora.rank or --last-layers, not both")
        for name in (
            *("steps", "minutes", "epochs", "save_every", "eval_every", "keep_every"),
            "last_layers",
            *("sequence_length", "batch_tokens", "microbatch_tokens"),
        ):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, name, value, "above 0 and finite")
        check(0 <= self.z_loss < 1, "z_loss", self.z_loss, "in [0, 1)")
        Ramp.parse(self.batch_ramp)
        self._check_pipeline()
        check(self.keep_checkpoints >= 0, "keep_checkpoints", self.keep_checkpoints, "0 or more")
        known = {*logger_names(self.loggers)} <= {*LOGGERS}
        wanted = f"{' or '.join(LOGGERS)}, or both with a comma between"
        check(known, "loggers", self.loggers, wanted)
        check(self.max_skipped_steps >= 1, "max_skipped_steps", self.max_skipped_steps, "1 or more")
        check(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit whole number")

    def _check_pipeline(self) -> None:
        stages = f"--parallel.pipeline {self.parallel.pipeline}"
        if self.parallel.pipeline == 1:
            return
        if not self.may_pipeline:
            raise SettingsError(
                f"{stages}: is for `train`; share this model by --parallel.shard, replicate or "
                "tensor"
            )
        for name, value in (("last_layers", self.last_layers), ("lora.rank", self.lora.rank)):
            if value:
                raise SettingsError(
                    f"{spell(name)} {value}: a pipeline trains every weight; leave it or {stages} "
                    "out"
                )

    @property
    def may_pipeline(self) -> bool:
        """Whether --parallel.pipeline may be above 1."""
        return False

    @property
    def scaling_depth(self) -> int | None:
        """--depth of `train`, which derives other settings; None for other verbs."""
        return None

    @property
    def no_model_message(self) -> str:
        """The error if no option names a model to train."""
        return NO_INIT

    @property
    def lengths(self) -> int:
        """Number of options given that set the run's length: one, or none with --depth."""
        return sum(length is not None for length in (self.steps, self.minutes, self.epochs))

    @property
    def takes_float16(self) -> bool:
        """Whether --dtype auto may choose float16; `dtype` of a subclass may not have it."""
        return True

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained."""
        return not self.lora.rank and self.last_layers is None


@dataclass(frozen=True, kw_only=True)
class TaskProbeSettings:
    """Tasks of lm-evaluation-harness, scored while the model trains."""

    eval_tasks: str | None = None
    """tasks of lm-evaluation-harness to score during training, with a comma between; needs
    pip install 'openpalm[eval]'"""
    eval_tasks_every: int | None = None
    """steps between two scorings; default: --eval-every"""
    eval_tasks_path: Path | None = None
    """folder with task definitions (.yaml) or rows of tasks (TASK/test.jsonl)"""
    eval_tasks_code: bool = False
    """run the Python code that definitions in --eval-tasks-path name"""
    eval_tasks_limit: int = 100
    """rows of each task, from the first on; 0 is all"""
    eval_tasks_fewshot: int | None = None
    """examples in each prompt; default: the task's own number"""

    def check_tasks(self) -> None:
        for name, least in (("every", 1), ("limit", 0), ("fewshot", 0)):
            value = getattr(self, f"eval_tasks_{name}")
            check(value is None or value >= least, f"eval_tasks_{name}", value, f"{least} or more")
        for name in ("every", "path", "fewshot") if self.eval_tasks is None else ():
            if (value := getattr(self, f"eval_tasks_{name}")) is not None:
                raise SettingsError(f"--eval-tasks-{name} {value}: needs --eval-tasks")


@dataclass(frozen=True)
class PretrainSettings(TaskProbeSettings, TrainSettings):
    """Settings of pretraining: a run on prepared text, one dataset or a mixture of several."""

    data: Path
    """directory that `openpalm data prepare` wrote, or a .yaml that mixes several"""
    depth: int | None = None
    """number of blocks, instead of --model; width, heads, batch, learning rates, weight decay and
    steps follow from it by rules and are printed; their own options override them"""
    document_mask: bool = False
    """attention only within documents, in training and validation"""
    force: bool = False
    """with --init: accept data of another tokenizer than the model's"""
    sample_prompts: list[str] | str | None = None
    """prompts of the samples in samples.jsonl, several as a JSON list; default: the first words of
    some validation documents"""

    def __post_init__(self) -> None:
        check(self.depth is None or self.depth > 0, "depth", self.depth, "above 0 and finite")
        if self.depth is not None and (self.model or self.init or self.arch.depth):
            raise SettingsError("give --depth alone, without --model, --init or --arch.depth")
        self.check_tasks()
        super().__post_init__()

    @property
    def scaling_depth(self) -> int | None:
        return self.depth

    @property
    def may_pipeline(self) -> bool:
        return True

    @property
    def no_model_message(self) -> str:
        return "give --model (see `openpalm models`) or --init"

"""Model architecture settings: sizes, norms, rotary positions, xPos, LoRA, reward heads, presets.

Computes parameters, FLOPs and bytes from the sizes; imports no torch.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from openpalm.errors import SettingsError

MAX_MEMBERS = 64
MAX_BINS = 4096
VOCAB_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, for aligned matrix multiplies."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one transformer.

    Raises SettingsError when a value is out of range or values contradict each other.
    """

    vocab_size: int
    """vocabulary size, in tokens"""
    dim: int
    """model dimension: width of the residual stream"""
    depth: int
    """number of blocks (layers)"""
    heads: int
    """number of query heads"""
    head_dim: int
    """dimension of one attention head"""
    ff_dim: int
    """hidden dimension of the feed-forward layer"""
    kv_heads: int = 1
    """number of key/value heads: 1 is multi-query, `heads` is multi-head, between is grouped"""
    context: int = 2048
    """context length of training, in tokens; longer inputs are accepted and extrapolate"""
    causal: bool = True
    """causal attention; False is a bidirectional encoder, where negative ids are masked padding"""
    feedforward: Literal["swiglu", "gelu"] = "swiglu"
    """feed-forward activation: swiglu (PaLM) or tanh-approximated gelu (GPT-J)"""
    bias: bool = False
    """biases in layer norms, feed-forward and head (GPT-J); PaLM has none"""
    embedding_bias: bool = False
    """learned vector added to every token embedding (mesh-transformer-jax)"""
    tied: bool = True
    """tied embeddings: the output head uses the embedding table"""
    qk_norm: bool = False
    """QK norm: RMS norm with a learned scale on every query and key head, before the rotation"""
    rotary: Literal["halves", "interleaved", "nanopalm"] = "halves"
    """coordinate pairs of rotary positions; nanopalm reproduces nanoPALM's mixed pairs"""
    rotary_dims: int = 0
    """rotated coordinates at the start of each head; 0 rotates all"""
    rotary_base: float = 10000.0
    """rotary base (theta)"""
    xpos_base: float = 0.0
    """xPos scale base, in positions (palm-rlhf-pytorch: 512); 0 is plain rotary"""
    norm_before_head: bool = True
    """final norm before the head; False is palm-rlhf-pytorch before 0.2.1"""
    logit_scale: float = 1.0
    """factor on the logits; PaLM uses 1/sqrt(dim)"""
    norm_eps: float = 1e-5
    """layer norm epsilon, added to the variance"""
    dropout: float = 0.0
    """dropout probability on the output of each block, in training"""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "dim",
            "depth",
            "heads",
            "head_dim",
            "ff_dim",
            "kv_heads",
            "context",
        ):
            if not 0 < getattr(self, name) < 1 << 31:
                raise SettingsError(f"model {name} ({getattr(self, name)}) must be at least 1")
        if self.heads % self.kv_heads:
            raise SettingsError(
                f"model kv_heads ({self.kv_heads}) must divide heads ({self.heads})"
            )
        if not 0 <= self.rotary_dims <= self.head_dim or self.rotated % 2:
            raise SettingsError(
                f"model rotary_dims ({self.rotary_dims}) must be even "
                f"and at most head_dim ({self.head_dim})"
            )
        if not 0 < self.logit_scale < math.inf:
            raise SettingsError(
                f"model logit_scale ({self.logit_scale}) must be above 0 and finite"
            )
        if not 0 < self.norm_eps <= 1:
            raise SettingsError(f"model norm_eps ({self.norm_eps}) must be above 0 and at most 1")
        if not 1 <= self.rotary_base < math.inf:
            raise SettingsError(f"model rotary_base ({self.rotary_base}) must be 1 or more, finite")
        if not 0 <= self.xpos_base < math.inf:
            raise SettingsError(f"model xpos_base ({self.xpos_base}) must be 0 or more, finite")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"model dropout ({self.dropout}) must be in [0, 1)")
        if self.xpos_base and not (self.causal and self.rotary == "halves"):
            raise SettingsError("model xpos_base needs causal=True and rotary=halves; set it to 0")

    @property
    def rotated(self) -> int:
        """Number of rotated coordinates of a head."""
        return self.rotary_dims or self.head_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table, padding included."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each matrix of a block; keys and values are separate here."""
        inner, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": inner, "k": keys, "v": keys, "gate": self.ff_dim, "up": self.ff_dim}
        if self.feedforward != "swiglu":
            del rows["gate"]
        inputs = {name: (count, self.dim) for name, count in rows.items()}
        return inputs | {"out": (self.dim, inner), "down": (self.dim, self.ff_dim)}

    @property
    def parameters(self) -> int:
        """Number of parameters, without the padding rows of the vocabulary."""
        d, inner = self.dim, self.heads * self.head_dim
        matrices = 3 if self.feedforward == "swiglu" else 2
        block = 2 * d * inner + 2 * d * self.kv_heads * self.head_dim + matrices * d * self.ff_dim
        norms = (self.depth + 1) * d * (2 if self.bias else 1)
        biases = self.depth * (self.ff_dim + d) + self.vocab_size if self.bias else 0
        biases += d if self.embedding_bias else 0
        scales = self.depth * 2 * self.head_dim if self.qk_norm else 0
        tables = self.vocab_size * d * (1 if self.tied else 2)
        return self.depth * block + norms + biases + scales + tables

    def flops_per_token(self, context: int | None = None) -> int:
        """FLOPs of training one token, forward and backward: 6N + 12 L h head_dim T.

        Source: PaLM (Chowdhery et al. 2022), appendix B. N counts the head's table once. As in
        the paper, the whole attention matrix counts, not its causal half.
        """
        matmul = self.parameters - (0 if self.tied else self.vocab_size * self.dim)
        attention = 12 * self.depth * self.heads * self.head_dim * (context or self.context)
        return 6 * matmul + attention

    def kv_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """KV cache bytes per token of one sequence."""
        return 2 * self.depth * self.kv_heads * self.head_dim * bytes_per_number


LORA_TARGETS = ("q", "k", "v", "gate", "up", "out", "down")
"""The matrices of a block that LoRA can adapt; only swiglu models have a gate."""


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter: W x + (alpha / rank) B A x for the target matrices of every block.

    Raises SettingsError for values that no model could have.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 < self.rank < 1 << 31:
            raise SettingsError(f"lora rank ({self.rank}) must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise SettingsError(f"lora alpha ({self.alpha}) must be above 0 and finite")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise SettingsError(
                    f"lora target {target}: no such matrix; take some of {', '.join(LORA_TARGETS)}"
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise SettingsError("lora targets must name at least one matrix, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, model: ModelConfig) -> None:
        """Raises SettingsError if the model lacks a target matrix or the rank is too large."""
        for target in self.targets:
            if target not in model.matrices:
                raise SettingsError(f"lora target {target}: a {model.feedforward} model has none")
            least = min(model.matrices[target])
            if self.rank > least:
                rows, columns = model.matrices[target]
                raise SettingsError(
                    f"lora rank ({self.rank}) must be at most {least}: {target} is {rows} x "
                    f"{columns}; lower it or leave {target} out of the targets"
                )

    def parameters(self, model: ModelConfig) -> int:
        """Number of parameters of the adapter of such a model."""
        return model.depth * sum(self.rank * sum(model.matrices[name]) for name in self.targets)


@dataclass(frozen=True)
class RewardConfig:
    """The heads of a reward model.

    Raises SettingsError when a value is out of range or values contradict each other.
    """

    kind: Literal["scalar", "binned", "ordinal"] = "scalar"
    """output of a head: a number, a distribution over `values`, or the odds of exceeding each"""
    values: tuple[float, ...] = ()
    """the reward of each bin, ascending; empty for a scalar"""
    read: Literal["last", "mean"] = "last"
    """pooling: the state of the last token, or the mean over all tokens (palm-rlhf-pytorch)"""
    marks: bool = False
    """learned prompt and completion vectors, added to the embeddings (palm-rlhf-pytorch)"""
    members: int = 1
    """ensemble size: heads over the same trunk; the reward is their mean"""
    bias: bool = False
    """bias of a scalar head; the other kinds always have one"""

    def __post_init__(self) -> None:
        if not 1 <= self.members <= MAX_MEMBERS:
            raise SettingsError(f"reward members ({self.members}) must be in 1..{MAX_MEMBERS}")
        least, most = (0, 0) if self.kind == "scalar" else (2, MAX_BINS)
        if not least <= len(self.values) <= most:
            raise SettingsError(
                f"reward values ({len(self.values)}) must be {least} to {most} for {self.kind}"
            )
        rising = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if not rising or not all(abs(value) < 1e30 for value in self.values):
            raise SettingsError("reward values must rise and be finite")

    @property
    def outputs(self) -> int:
        """Outputs of a head: 1, one logit per bin, or one per step between ordinal values."""
        return max(1, len(self.values) - (self.kind == "ordinal"))

    @property
    def directions(self) -> int:
        """Rows of a head's matrix; steps of an ordinal head share a row and differ in bias."""
        return len(self.values) if self.kind == "binned" else 1


@dataclass(frozen=True)
class Preset:
    """A named size; its `vocab_size` applies unless a tokenizer determines it."""

    config: ModelConfig
    learning_rate: float
    about: str


def _palm(
    dim: int, depth: int, heads: int, head_dim: int, vocab: int, context: int, **more: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        depth=depth,
        heads=heads,
        head_dim=head_dim,
        ff_dim=more.get("ff_dim", 4 * dim),
        context=context,
    )


_HUB = "conceptofmind's size, 8k context"
_OURS = "ours; trains on a laptop"
_PAPER = "PaLM paper, table 1"

PRESETS: dict[str, Preset] = {
    "palm-tiny": Preset(_palm(128, 4, 4, 32, 320, 256), 3e-3, "ours; trains in seconds, for tests"),
    "palm-5m": Preset(_palm(256, 4, 4, 64, 4096, 512), 2e-3, _OURS),
    "palm-14m": Preset(_palm(384, 6, 6, 64, 4096, 512), 1.5e-3, _OURS),
    "palm-32m": Preset(_palm(512, 8, 8, 64, 4096, 1024), 1e-3, _OURS),
    "palm-150m": Preset(_palm(768, 12, 8, 128, 50304, 8192), 6e-4, _HUB),
    "palm-410m": Preset(_palm(1024, 24, 8, 128, 50304, 8192), 3e-4, _HUB),
    "palm-1b": Preset(_palm(2048, 16, 8, 128, 50304, 8192), 3e-4, _HUB),
    "palm-2.1b": Preset(_palm(2560, 24, 8, 128, 50304, 8192), 1.8e-4, _HUB),
    "palm-3b": Preset(
        _palm(3072, 24, 8, 128, 50304, 8192), 1.6e-4, "ours; never published by conceptofmind"
    ),
    "palm-8b": Preset(_palm(4096, 32, 16, 256, 256000, 2048), 1e-4, _PAPER),
    "palm-62b": Preset(_palm(8192, 64, 32, 256, 256000, 2048), 1e-4, _PAPER),
    "palm-540b": Preset(_palm(18432, 118, 48, 256, 256000, 2048), 1e-4, _PAPER),
    "nanopalm-213m": Preset(
        _palm(768, 4, 6, 128, 50304, 1024, ff_dim=4 * 6 * 768), 6e-4, "nanoPALM's size"
    ),
    "gpt-j-6b": Preset(
        ModelConfig(
            vocab_size=50400,
            dim=4096,
            depth=28,
            heads=16,
            head_dim=256,
            ff_dim=16384,
            kv_heads=16,
            feedforward="gelu",
            bias=True,
            tied=False,
            rotary="interleaved",
            rotary_dims=64,
        ),
        1.2e-4,
        "GPT-J's size and function",
    ),
}


def preset(name: str) -> Preset:
    """The preset with this name. Raises SettingsError with the closest name for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `openpalm models`"
        raise SettingsError(f"--model {name}: no such preset; {hint}")
    return PRESETS[name]


def config_from_json(values: object, where: str) -> ModelConfig:
    """A ModelConfig from a parsed config.json. Raises SettingsError naming the file and field."""
    return _from_json(ModelConfig, values, where, "model")


def reward_from_json(values: object, where: str) -> RewardConfig:
    """A RewardConfig from a parsed config.json. Raises SettingsError naming the file and field."""
    return _from_json(RewardConfig, values, where, "reward")


C = TypeVar("C", ModelConfig, RewardConfig)


def _from_json(kind: type[C], values: object, where: str, what: str) -> C:
    fields: dict[str, dataclasses.Field[Any]] = {
        field.name: field for field in dataclasses.fields(kind)
    }
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: the {what}'s settings must be a JSON object")
    for name, value in values.items():
        if name not in fields:
            raise SettingsError(f"{where}: unknown {what} field {name}")
        if not _fits(value, fields[name].type):
            wanted = _wanted(fields[name].type)
            raise SettingsError(
                f"{where}: {what} field {name} cannot be {value!r:.100}; it must be {wanted}"
            )
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise SettingsError(f"{where}: the {what}'s settings lack {', '.join(missing)}")
    given: dict[str, Any] = {n: tuple(v) if type(v) is list else v for n, v in values.items()}
    return kind(**given)


def lora_from_json(values: object, where: str) -> LoraConfig:
    """A LoraConfig from a parsed config.json. Raises SettingsError naming the file."""
    if isinstance(values, dict) and values.keys() == {"rank", "alpha", "targets"}:
        targets = values["targets"]
        named = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        if named and _fits(values["rank"], int) and _fits(values["alpha"], float):
            return LoraConfig(values["rank"], values["alpha"], tuple(targets))
    raise SettingsError(f"{where}: its lora must be rank, alpha and targets")


def _wanted(kind: object) -> str:
    """The values that `_fits` accepts, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    if isinstance(kind, type) and kind in names:
        return names[kind]
    choices = getattr(kind, "__args__", ())
    return "a list of numbers" if kind == tuple[float, ...] else f"one of {', '.join(choices)}"


def _fits(value: object, kind: object) -> bool:
    if kind is bool or kind is int:
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if kind == tuple[float, ...]:
        return isinstance(value, list) and all(_fits(v, float) for v in value)
    return value in getattr(kind, "__args__", ())

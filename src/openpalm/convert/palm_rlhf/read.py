"""Converts state dicts of palm-rlhf-pytorch and PaLM-pytorch, with the same logits.

eras.py has the differences between versions; write.py converts back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openpalm.convert.conversion import Converted, pad_vocabulary
from openpalm.convert.eras import ERAS, Era, era_of, guess_era, is_known_version
from openpalm.convert.files import Hyperparameters, Tensors
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig

PROJECT = "palm-rlhf-pytorch"

NO_XPOS_BASE = 10**18
"""xPos base at which every scale rounds to one: the newest version has no other "no xPos"."""

_DEFAULT_XPOS_BASE = 512
_ARGUMENTS = frozenset(
    (
        *("num_tokens", "dim", "depth", "causal", "dim_head", "heads", "ff_mult"),
        *("attn_dropout", "ff_dropout", "qk_rmsnorm", "lora_r", "rotary_xpos_scale_base"),
        *("flash_attn", "finetune_scopes", "cross_entropy_ignore_index"),
    )
)
_LABELS = frozenset({"system", "version", "commit", "kind"})
REWARD_ARGUMENTS = frozenset(
    (
        *("dropout", "num_binned_output", "use_lora", "lora_r", "reward_lora_scope"),
        *("sample_from_bins", "sample_temperature"),
    )
)
_OLDEST_NOTE = (
    "warning: version 0.0.2 adds the residual stream twice in each block; the converted model "
    "adds it once, like every later version"
)


@dataclass(frozen=True)
class _Names:
    """The names of the same tensors in the two projects."""

    depth: int
    embedding: str
    block: Callable[[int], str]
    norm: str
    head: str

    def ff_out(self, i: int, tensors: Tensors) -> str:
        """ff_out is a Sequential: its matrix has index 1, or 2 after a dropout layer."""
        short = f"{self.block(i)}ff_out.1.weight"
        return short if short in tensors else f"{self.block(i)}ff_out.2.weight"


@dataclass(frozen=True)
class _Choice:
    """The era, the reason for it, and warnings."""

    era: Era
    why: str
    notes: list[str]


def read_palm_rlhf(tensors: Tensors, given: Hyperparameters, era: str | None) -> Converted:
    """Converts a palm-rlhf-pytorch state dict; `era` is a version, None guesses it.

    Raises CheckpointError if the tensors contradict each other, `given` or the format.
    """
    block = "layers.{}.fn.".format
    depth = _depth(tensors, block)
    names = _Names(depth, "token_emb.weight", block, "norm.", "to_logits.weight")
    choice = _choose(tensors, given, era, names)
    if tensors.drop(r"finetune_modules\."):
        choice.notes.append(
            "LoRA factors left out: the original applies them only where a scope is named"
        )
    return _read(tensors, given, names, choice)


def read_palm_pytorch(tensors: Tensors, given: Hyperparameters, era: str | None) -> Converted:
    """Converts a PaLM-pytorch state dict: the function of era 0.2.1 without xPos.

    Raises CheckpointError like `read_palm_rlhf`, and for an `era`.
    """
    if era is not None:
        raise CheckpointError(
            f"--era {era}: PaLM-pytorch has no versions that differ; leave it out"
        )

    def block(i: int) -> str:
        return f"{i + 1}.fn."  # indices of an nn.Sequential

    depth = _depth(tensors, block)
    names = _Names(depth, "0.weight", block, f"{depth + 1}.", f"{depth + 2}.weight")
    plain = Era("all versions", "all versions", gamma_minus_one=False, final_norm=True, xpos=False)
    return _read(tensors, given, names, _Choice(plain, "PaLM-pytorch has one function", []))


def inverse_frequencies(head_dim: int) -> Tensor:
    """The buffer rotary_emb.inv_freq, [head_dim / 2]."""
    return 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)


def xpos_scale(head_dim: int) -> Tensor:
    """The buffer rotary_emb.scale, [head_dim / 2]."""
    return (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)


def qk_factor(era: Era, head_dim: int) -> float:
    """Factor from an era's q_scale and k_scale to ours."""
    root = head_dim**-0.5
    return ((era.qk_scale or root) * root) ** 0.5


def _depth(tensors: Tensors, block: Callable[[int], str]) -> int:
    depth = 0
    while f"{block(depth)}attn_out.weight" in tensors:
        depth += 1
    if not depth:
        first = f"{block(0)}attn_out.weight"
        raise CheckpointError(f"{tensors.where}: holds no {first}; it is another kind of model")
    return depth


def _choose(tensors: Tensors, given: Hyperparameters, asked: str | None, names: _Names) -> _Choice:
    """The era that was asked for, else that of config.json, else a guess; with warnings."""
    gammas = torch.cat([tensors.peek(f"{names.block(i)}norm.gamma") for i in range(names.depth)])
    final = tensors.peek(f"{names.norm}gamma")
    mean = gammas.mean().item()
    rotary = f"{names.block(0)}rotary_emb."
    # A file without any buffer does not show whether there is xPos.
    has_scale = f"{rotary}scale" in tensors or f"{rotary}inv_freq" not in tensors
    unused = bool((final == 1).all() and not (gammas == 1).all())
    guessed, reason = guess_era(mean, has_scale=has_scale, norm_unused=unused)
    stated = _stated_version(given)
    if asked is not None:
        era, why = era_of(asked), f"--era {asked}"
    elif stated:
        era, why = era_of(stated), f"{given.where} says version {stated}"
    else:
        era, why = guessed, f"a guess: {reason}"
    notes = [_OLDEST_NOTE] if era == ERAS[0] else []
    if stated and era_of(stated) != era:
        notes.append(f"warning: {given.where} says version {stated}, which is not era {era}")
    if era.gamma_minus_one != guessed.gamma_minus_one:
        looks = f"they look like era {guessed}"
        notes.append(f"warning: norm scales average {mean:.2f}, unlike era {era}; {looks}")
    if era.xpos != has_scale:
        held = "holds" if has_scale else "lacks"
        notes.append(f"warning: the file {held} xPos scales, unlike era {era}")
    return _Choice(era, why, notes)


def _stated_version(given: Hyperparameters) -> str:
    """The version in config.json if it is a known one of this project, else an empty text."""
    version = given.values.get("version")
    if given.values.get("system") != PROJECT or not isinstance(version, str):
        return ""
    return version if is_known_version(version) else ""


def _read(tensors: Tensors, given: Hyperparameters, names: _Names, choice: _Choice) -> Converted:
    era = choice.era
    config = _config(tensors, given, names, era)
    state = {"embedding": pad_vocabulary(_table(tensors, names, config), config)}
    for i in range(names.depth):
        block = names.block(i)
        ff_out = names.ff_out(i, tensors)
        parts = _matrices(tensors, block, ff_out, config)
        parts["norm.weight"] = _norm(tensors, f"{block}norm.", config, era)
        if config.qk_norm:
            parts |= _scales(tensors, block, config, era)
        tensors.take_known(f"{block}rotary_emb.inv_freq", inverse_frequencies(config.head_dim))
        tensors.take_known(f"{block}rotary_emb.scale", xpos_scale(config.head_dim))
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
    state["norm.weight"] = _norm(tensors, names.norm, config, era)
    tensors.finish()
    notes = [*choice.notes, *_hyperparameter_notes(given, config), _folding_note(config, era)]
    return Converted(config, state, str(era), choice.why, notes)


def _config(tensors: Tensors, given: Hyperparameters, names: _Names, era: Era) -> ModelConfig:
    """Sizes from the shapes; those in `given` must agree."""
    table = names.embedding if names.embedding in tensors else names.head
    block = names.block(0)
    vocab, dim = tensors.shape(table, 2)
    inner = tensors.shape(f"{block}attn_out.weight", 2)[1]
    ff_dim = tensors.shape(names.ff_out(0, tensors), 2)[1]
    fused = tensors.shape(f"{block}fused_attn_ff_proj.weight", 2)[0]
    head_dim, odd = divmod(fused - inner - 2 * ff_dim, 2)  # rows: q, k, v, value, gate
    if odd or head_dim < 2 or head_dim % 2 or inner % head_dim:
        raise CheckpointError(
            f"{tensors.where}: {fused} fused rows do not hold {inner} query and 2 x {ff_dim} "
            "feed-forward rows and one key/value head; the file was altered"
        )
    heads = inner // head_dim
    qk_norm = f"{block}q_scale" in tensors
    given.agree(num_tokens=vocab, dim=dim, depth=names.depth, dim_head=head_dim, heads=heads)
    given.agree(qk_rmsnorm=qk_norm)
    if "ff_mult" in given.values:
        given.agree(ff_mult=ff_dim // dim if ff_dim % dim == 0 else ff_dim / dim)
    causal = given.flag("causal", True)
    base = given.positive("rotary_xpos_scale_base", _DEFAULT_XPOS_BASE)
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        depth=names.depth,
        heads=heads,
        head_dim=head_dim,
        ff_dim=ff_dim,
        causal=causal,
        qk_norm=qk_norm,
        xpos_base=base if era.xpos and causal and base < NO_XPOS_BASE else 0.0,
        norm_before_head=era.final_norm,
    )


def _matrices(tensors: Tensors, block: str, ff_out: str, config: ModelConfig) -> dict[str, Tensor]:
    inner, hidden, dim = config.heads * config.head_dim, config.ff_dim, config.dim
    rows = [inner, 2 * config.head_dim, hidden, hidden]
    fused = tensors.take(f"{block}fused_attn_ff_proj.weight", sum(rows), dim)
    q, kv, value, gate = (part.clone() for part in fused.split(rows))
    return {
        "project_in.q": q,
        "project_in.kv": kv,
        "project_in.gate": gate,
        "project_in.up": value,
        "project_out.out": tensors.take(f"{block}attn_out.weight", dim, inner),
        "project_out.down": tensors.take(ff_out, dim, hidden),
    }


def _scales(tensors: Tensors, block: str, config: ModelConfig, era: Era) -> dict[str, Tensor]:
    """Query and key scales. With rms(x) = d^0.5 l2(x), the scores are equal,

    scale l2(q) a . l2(k) b = d^-0.5 rms(q) f a . rms(k) f b,  if f^2 = scale d^-0.5.
    """
    factor = qk_factor(era, config.head_dim)
    return {
        f"attention.{name}": tensors.take(f"{block}{name}", config.head_dim) * factor
        for name in ("q_scale", "k_scale")
    }


def _table(tensors: Tensors, names: _Names, config: ModelConfig) -> Tensor:
    """The tied table; safetensors keeps only one name of a shared storage, either one."""
    present = [name for name in (names.embedding, names.head) if name in tensors]
    tables = [tensors.take(name, config.vocab_size, config.dim) for name in present]
    if not all(torch.equal(table, tables[0]) for table in tables):
        raise CheckpointError(
            f"{tensors.where}: {' and '.join(present)} differ, but the original ties them"
        )
    return tables[0]


def _norm(tensors: Tensors, name: str, config: ModelConfig, era: Era) -> Tensor:
    tensors.take_known(f"{name}beta", torch.zeros(config.dim))
    return tensors.take(f"{name}gamma", config.dim) + float(era.gamma_minus_one)


def _hyperparameter_notes(given: Hyperparameters, config: ModelConfig) -> list[str]:
    source = given.where if given.values else "the tensors' shapes and the original's defaults"
    xpos = f"xPos base {config.xpos_base:g}" if config.xpos_base else "no xPos"
    sizes = f"dim {config.dim}, depth {config.depth}, heads {config.heads} x {config.head_dim}"
    reads = "causal" if config.causal else "reading in both directions"
    unknown = sorted(given.values.keys() - _ARGUMENTS - REWARD_ARGUMENTS - _LABELS)
    return [
        f"hyperparameters from {source}: {sizes}, {xpos}, {reads}",
        *([f"{given.where}: not used: {', '.join(unknown)}"] if unknown else []),
    ]


def _folding_note(config: ModelConfig, era: Era) -> str:
    folded = ["fused rows split"]
    if era.gamma_minus_one:
        folded.append("one added to the norms' scales")
    if config.qk_norm:
        scale = f"{era.qk_scale:g}" if era.qk_scale else "dim_head^-0.5"
        folded.append(f"L2 norms and attention scale {scale} made RMS query/key scales")
    if config.padded_vocab != config.vocab_size:
        folded.append(f"{config.vocab_size} table rows padded to {config.padded_vocab}")
    return "folded: " + "; ".join(folded)

"""The transformer a second time, in numpy and float64, written from the papers' equations.

One token, one head, one pair of coordinates at a time where that keeps the equation readable;
shares nothing with openpalm.model but the meaning of ModelConfig and of the parameters' names.
"""

import math

import numpy as np

from openpalm.model.config import ModelConfig

Array = np.ndarray


def logits(config: ModelConfig, weights: dict[str, Array], ids: Array) -> Array:
    """[batch, time, vocab_size] of ids [batch, time]."""
    return np.stack([_sequence(config, weights, row) for row in ids])


def _sequence(config: ModelConfig, w: dict[str, Array], ids: Array) -> Array:
    x = w["embedding"][np.maximum(ids, 0)]
    for i in range(config.depth):
        here = f"blocks.{i}."
        mine = {k.removeprefix(here): v for k, v in w.items() if k.startswith(here)}
        h = _layer_norm(x, mine["norm.weight"], mine.get("norm.bias"), config.norm_eps)
        x = x + _attention(config, mine, h, ids) + _feedforward(config, mine, h)
    if config.norm_before_head:
        x = _layer_norm(x, w["norm.weight"], w.get("norm.bias"), config.norm_eps)
    table = w["embedding"] if config.tied else w["unembedding"]
    return (config.logit_scale * (x @ table.T) + w.get("head_bias", 0.0))[:, : config.vocab_size]


def _layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normal * scale + (0 if bias is None else bias)


def _attention(config: ModelConfig, w: dict[str, Array], h: Array, ids: Array) -> Array:
    d, groups = config.head_dim, config.heads // config.kv_heads
    keys, values = np.split(h @ w["project_in.kv"].T, 2, axis=-1)
    queries = h @ w["project_in.q"].T
    heads = []
    for head in range(config.heads):
        shared = head // groups
        q = queries[:, head * d : (head + 1) * d]
        k = keys[:, shared * d : (shared + 1) * d]
        v = values[:, shared * d : (shared + 1) * d]
        if config.qk_norm:
            q = _unit(q) * math.sqrt(d) * w["attention.q_scale"]
            k = _unit(k) * math.sqrt(d) * w["attention.k_scale"]
        heads.append(_one_head(config, q, k, v, ids))
    return np.concatenate(heads, axis=-1) @ w["project_out.out"].T


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _one_head(config: ModelConfig, q: Array, k: Array, v: Array, ids: Array) -> Array:
    out = np.zeros_like(q)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if (j <= i if config.causal else ids[j] >= 0)]
        # xPos multiplies the query by s^i and the key by s^-j: uncentred, as the paper has it.
        scores = [_turn(config, q[i], i, 1) @ _turn(config, k[j], j, -1) for j in seen]
        exponent = np.exp(np.array(scores) / math.sqrt(config.head_dim))
        out[i] = (exponent / exponent.sum()) @ v[seen]
    return out


def _turn(config: ModelConfig, x: Array, position: int, sign: int) -> Array:
    """Rotates each pair of coordinates by its angle: (a, b) -> (a cos - b sin, b cos + a sin)."""
    n = config.rotary_dims or config.head_dim
    out = x.copy()
    for j in range(n // 2):
        first, second = (j, j + n // 2) if config.rotary == "halves" else (2 * j, 2 * j + 1)
        angle = position * config.rotary_base ** (-2 * j / n)
        decay = 1.0
        if config.xpos_base:
            decay = ((2 * j + 0.4 * n) / (1.4 * n)) ** (sign * position / config.xpos_base)
        a, b = x[first], x[second]
        out[first] = decay * (a * math.cos(angle) - b * math.sin(angle))
        out[second] = decay * (b * math.cos(angle) + a * math.sin(angle))
    return out


def _feedforward(config: ModelConfig, w: dict[str, Array], h: Array) -> Array:
    up = h @ w["project_in.up"].T + w.get("project_in.up_bias", 0.0)
    if config.feedforward == "swiglu":
        gate = h @ w["project_in.gate"].T
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
        hidden = 0.5 * up * (1 + np.tanh(inner))
    return hidden @ w["project_out.down"].T + w.get("project_out.down_bias", 0.0)

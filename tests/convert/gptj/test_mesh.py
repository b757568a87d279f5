"""mesh-transformer-jax: its own logits, tokens, moments and bytes, at every number of shards."""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.directory import TrainState
from openpalm.checkpoint.lazy_state import LazyState, LazyTensor
from openpalm.checkpoint.streamed_logits import streamed_logits
from openpalm.cli.main import main
from openpalm.convert.gptj.mesh_read import read_mesh
from openpalm.convert.gptj.mesh_write import write_mesh
from openpalm.errors import CheckpointError, SettingsError
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.inherited_optimizer import check_optimizer, inherit_optimizer
from openpalm.train.optimization.parameter_groups import Optimizer

ROTO = Path(__file__).parents[2] / "parity/data/mesh-transformer-jax/roto"
PROMPT = 11
"""tokens of the generated rows that were given"""


def array(name):
    return torch.from_numpy(np.load(ROTO / f"{name}.npy"))


def arrays(folder, shard):
    """Every array of a shard, in order, as numpy reads it."""
    found = []
    for file in range(16):
        with np.load(folder / f"shard_{shard}" / f"{file}.npz", allow_pickle=False) as content:
            found += [content[f"arr_{index}"] for index in range(len(content.files))]
    return found


def same_files(one, other):
    files = sorted(path.relative_to(one) for path in one.rglob("*.npz"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.npz"))
    return [file for file in files if members(one / file) != members(other / file)]


def members(path):
    """Name and bytes of each array; Python 3.11.4 changed the archive's headers around them."""
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def resharded(source, target, shards):
    mesh = read_mesh(source)
    step = mesh.step
    write_mesh(target, mesh.config, mesh.weights, mesh.moments, shards=shards, step=step)
    return target


@pytest.mark.parametrize(("kind", "logits"), [("full", "logits"), ("slim", "logits_slim")])
def test_logits_are_the_originals(kind, logits, tmp_path):
    mesh = read_mesh(ROTO / kind)
    computed = streamed_logits(mesh.config, mesh.weights, array("tokens"))
    assert (computed - array(logits)).abs().max() < 1e-5
    assert main(["convert", str(ROTO / kind), str(tmp_path / "ours")]) == 0
    model = openpalm.load(tmp_path / "ours")
    assert (model.logits(array("tokens")) - array(logits)).abs().max() < 1e-5


def test_generation_and_losses_are_the_originals(tmp_path):
    assert main(["convert", str(ROTO / "slim"), str(tmp_path / "ours")]) == 0
    model = checkpoint.load(tmp_path / "ours")
    tokens, steps = array("tokens"), array("generated_tokens").shape[1]
    requests = [Request(row[:PROMPT].tolist(), steps, Sampling(temperature=0.0)) for row in tokens]
    generated = array("generated_tokens")
    assert Engine(model, slots=2).completions(requests) == generated.tolist()
    read = torch.cat([tokens[:, :PROMPT], generated], dim=1)
    stepwise = model.logits(read)[:, PROMPT - 1 : -1]
    assert (stepwise - array("generated_logits")).abs().max() < 1e-4
    logits = model.logits(tokens)
    rolled = tokens.roll(-1, dims=1)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rolled.flatten(), reduction="none"
    )
    expected = array("eval_all_loss_slim")
    assert torch.allclose(losses.view(expected.shape), expected.float(), atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "slim"])
def test_resharded_and_back_is_the_same_bytes(kind, tmp_path):
    """Through one shard, and through an OpenPaLM checkpoint."""
    one = resharded(ROTO / kind, tmp_path / "one", 1)
    assert len(list((one / "step_3").iterdir())) == 1
    two = resharded(one, tmp_path / "two", 2)
    assert same_files(ROTO / kind, two) == []
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(ROTO / kind), ours]) == 0
    assert main(["convert", ours, back, "--to", "mesh-transformer-jax", "--shards", "2"]) == 0
    assert same_files(ROTO / kind / "step_3", Path(back) / "step_3") == []


def test_four_eight_two_four(tmp_path):
    config = replace(
        read_mesh(ROTO / "full").config, heads=8, kv_heads=8, head_dim=8, dim=64, ff_dim=256
    )
    model = Transformer(config)
    initialise(model, 0)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            if tensor.dim() == 1:
                tensor.normal_()
            # Rows of padding are no part of the checkpoint.
            if name in ("embedding", "unembedding", "head_bias"):
                tensor[config.vocab_size :] = 0
    weights = LazyState(
        tmp_path, {n: LazyTensor(tuple(t.shape), t.dtype, t.detach) for n, t in state.items()}
    )
    write_mesh(tmp_path / "4", config, weights, None, shards=4, step=7)
    eight = resharded(tmp_path / "4", tmp_path / "8", 8)
    two = resharded(eight, tmp_path / "2", 2)
    assert same_files(tmp_path / "4", resharded(two, tmp_path / "4b", 4)) == []
    read = read_mesh(eight)
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in state.items())


def joined_by_hand(folder):
    """FORMAT's rules in numpy, for two shards: name in our layout -> weight, first, second."""
    first, second = arrays(folder, 0), arrays(folder, 1)
    leaves = (len(first) - 3) // 3

    def at(index, rule, start, moment):
        one, two = first[start + index], second[start + index]
        if rule == "sum":
            return one if moment else one + two
        if rule == "shard 0":
            return one
        return np.concatenate([one, two], axis=rule)

    rules = {"embedding_bias": "sum", "embedding": 0}
    block = {
        "q": 1,
        "v": 1,
        "k": 1,
        "out": 0,
        "up_bias": 0,
        "up": 1,
        "down_bias": "sum",
        "down": 0,
        "norm.bias": "shard 0",
        "norm.weight": "shard 0",
    }
    for layer in sorted(range(11), key=str):
        rules |= {f"{layer}.{name}": rule for name, rule in block.items()}
    rules |= {"head_bias": 0, "unembedding": 1, "norm.bias": "shard 0", "norm.weight": "shard 0"}
    assert len(rules) == leaves
    starts = (2 * leaves + 2, 1, 1 + leaves)
    return {
        name: [at(index, rule, start, start != starts[0]) for start in starts]
        for index, (name, rule) in enumerate(rules.items())
    }


def in_our_layout(parts):
    """The hand-joined arrays under our names: matrices transposed, keys before values."""
    ours = {name: parts[name] for name in ("embedding_bias", "embedding", "head_bias")}
    ours |= {name: parts[name] for name in ("norm.bias", "norm.weight")}
    ours["unembedding"] = [array.T for array in parts["unembedding"]]
    for layer in range(11):
        of = {name: parts[f"{layer}.{name}"] for name in ("q", "k", "v", "up", "out", "down")}
        of = {name: [array.T for array in all_three] for name, all_three in of.items()}
        place = f"blocks.{layer}."
        pairs = zip(of["k"], of["v"], strict=True)
        ours[f"{place}project_in.kv"] = [np.concatenate(pair) for pair in pairs]
        ours |= {f"{place}project_in.{name}": of[name] for name in ("q", "up")}
        ours |= {f"{place}project_out.{name}": of[name] for name in ("out", "down")}
        ours[f"{place}project_in.up_bias"] = parts[f"{layer}.up_bias"]
        ours[f"{place}project_out.down_bias"] = parts[f"{layer}.down_bias"]
        for name in ("norm.bias", "norm.weight"):
            ours[place + name] = parts[f"{layer}.{name}"]
    return ours


def test_moments_are_those_that_numpy_joins():
    mesh = read_mesh(ROTO / "full")
    expected = in_our_layout(joined_by_hand(ROTO / "full/step_3"))
    assert expected.keys() == set(mesh.weights)
    for name, (weight, first, second) in expected.items():
        rows = len(weight)
        assert np.array_equal(mesh.weights[name][:rows].numpy(), weight), name
        assert np.array_equal(mesh.moments[f"{name}/exp_avg"][:rows].numpy(), first), name
        assert np.array_equal(mesh.moments[f"{name}/exp_avg_sq"][:rows].numpy(), second), name
        assert float(mesh.moments[f"{name}/step"]) == 3
    assert np.abs(expected["embedding_bias"][1]).max() > 0
    assert np.abs(expected["blocks.3.norm.weight"][2]).max() > 0


def test_one_step_of_adamw_goes_on_from_them():
    """The step written out in float64 from the hand-joined arrays."""
    mesh = read_mesh(ROTO / "full")
    model = Transformer(mesh.config)
    model.load_state_dict(dict(mesh.weights))
    lr, decay, beta1, beta2, eps = 1e-3, 0.1, 0.9, 0.999, 1e-8
    settings = OptimSettings(beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, clip=1e9)
    optimizer = Optimizer(model, settings, lr)
    optimizer.load_state_tensors(dict(mesh.moments))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    gradients = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
    optimizer.step(1.0)
    changed = dict(model.named_parameters())
    for name, all_three in in_our_layout(joined_by_hand(ROTO / "full/step_3")).items():
        weight, first, second = (array.astype(np.float64) for array in all_three)
        gradient = gradients[name][: len(weight)]
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        update = (first / (1 - beta1**4)) / (np.sqrt(second / (1 - beta2**4)) + eps)
        decayed = decay * weight if weight.ndim == 2 else 0
        expected = weight - lr * (update + decayed)
        found = changed[name].detach().double().numpy()[: len(weight)]
        assert np.abs(found - expected).max() < 1e-6, name


def test_keep_optimizer_takes_them_over(tmp_path):
    """What `convert` writes is what --keep-optimizer reads: moments and the three steps."""
    assert main(["convert", str(ROTO / "full"), str(tmp_path / "ours")]) == 0
    model = openpalm.load(tmp_path / "ours")
    optimizer = Optimizer(model, OptimSettings(), 1e-3)
    check_optimizer(tmp_path / "ours", optimizer.settings)
    inherit_optimizer(optimizer, tmp_path / "ours", "train")
    expected = dict(read_mesh(ROTO / "full").moments)
    found = optimizer.state_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert main(["convert", str(ROTO / "slim"), str(tmp_path / "slim")]) == 0
    with pytest.raises(SettingsError, match="holds no optimizer state"):
        check_optimizer(tmp_path / "slim", optimizer.settings)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_moments_of_adamw_alone_are_written(tmp_path, name):
    """Adafactor's moments have the same names and another meaning."""
    mesh = read_mesh(ROTO / "full")
    model = Transformer(mesh.config)
    model.load_state_dict(dict(mesh.weights))
    state = {f"optimizer/{key}": tensor for key, tensor in dict(mesh.moments).items()}
    checkpoint.save(tmp_path / "ours", model, train=TrainState(state, {"optimizer": name}))
    target = tmp_path / "theirs"
    words = ["--to", "mesh-transformer-jax", "--shards", "2"]
    assert main(["convert", str(tmp_path / "ours"), str(target), *words]) == 0
    assert (read_mesh(target).moments is not None) == (name == "adamw")


# --- which folder, which config


def test_the_step_that_meta_json_names(tmp_path):
    shutil.copytree(ROTO / "full", tmp_path / "run")
    shutil.copytree(tmp_path / "run/step_3", tmp_path / "run/step_30")
    shutil.copy(ROTO / "config.json", tmp_path)
    assert read_mesh(tmp_path / "run").folder.name == "step_3"
    (tmp_path / "run/meta.json").unlink()
    assert read_mesh(tmp_path / "run").folder.name == "step_30"
    (tmp_path / "run/meta.json").write_text('{"checkpoints": [4]}')
    with pytest.raises(CheckpointError, match="names no step that is here"):
        read_mesh(tmp_path / "run")


def test_without_its_config(tmp_path):
    shutil.copytree(ROTO / "slim", tmp_path / "a/b/slim")
    with pytest.raises(CheckpointError, match="give the config that it was trained with"):
        read_mesh(tmp_path / "a/b/slim")
    assert read_mesh(tmp_path / "a/b/slim", ROTO / "config.json").config.depth == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 10}, "arrays per shard, which a model of 10 layers does not have"),
        ({"layers": 10**9}, "arrays per shard, which a model of 1000000000 layers"),
        ({"d_model": 48}, "where this config needs"),
        ({"n_vocab": 256}, "where this config needs"),
        ({"n_heads": 3}, "2 shards do not divide n_heads 3"),
        ({"n_heads": 5}, "n_heads 5 does not divide d_model 24"),
        ({"pe": "t5"}, "pe 't5' is not read, only rotary"),
        ({"norm": "rmsnorm"}, "norm 'rmsnorm' is not read"),
        ({"d_model": "24"}, "d_model cannot be '24'"),
        ({"pe_rotary_dims": 400}, "rotary_dims"),
    ],
)
def test_another_config(tmp_path, change, said):
    values = json.loads((ROTO / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=said):
        dict(read_mesh(ROTO / "slim", tmp_path / "config.json").weights)


@pytest.mark.parametrize(("shards", "odd"), [(3, "n_heads 2, n_vocab 128"), (4, "n_heads 2")])
def test_shards_that_do_not_divide(tmp_path, capsys, shards, odd):
    assert main(["convert", str(ROTO / "slim"), str(tmp_path / "ours")]) == 0
    words = ["convert", str(tmp_path / "ours"), str(tmp_path / "mesh")]
    status = main([*words, "--to", "mesh-transformer-jax", "--shards", str(shards)])
    said = f"--shards {shards}: {shards} shards do not divide {odd}; numbers that do: 1, 2\n"
    assert (status, said in capsys.readouterr().err) == (2, True)
    assert not (tmp_path / "mesh").exists()


# --- hostile and damaged files


def rewritten(path, change):
    """Writes the npz file again with `change(name, bytes) -> (bytes, compression)`."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            data, how = change(name, data)
            archive.writestr(name, data, how)


def npy(array, **how):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **how)
    return stream.getvalue()


class Bomb:
    def __reduce__(self):
        return open, ("executed", "w")


DAMAGE = {
    "a pickled object": (
        lambda name, data: (npy(np.array([Bomb()]), allow_pickle=True), 0),
        "is no array",
    ),
    "compressed": (lambda name, data: (data, zipfile.ZIP_DEFLATED), "is compressed"),
    "a zip bomb": (lambda name, data: (bytes(1 << 26), zipfile.ZIP_DEFLATED), "is compressed"),
    "a header that declares more": (
        lambda name, data: (data.replace(b"(24,), }   ", b"(2400,), } "), 0),
        "where this config needs|another size",
    ),
    "a truncated array": (lambda name, data: (data[:-5], 0), "another size than it declares"),
    "an array that goes on": (lambda name, data: (data + b"more", 0), "another size"),
    "float64": (lambda name, data: (data.replace(b"<f4", b"<f8"), 0), "no type of a checkpoint"),
    "code in the header": (
        lambda name, data: (data.replace(b"(24,), }", b"(id(),)}"), 0),
        "header is not one of numpy",
    ),
    "a long header": (
        lambda name, data: (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(200), 0),
        "header is too long",
    ),
    "no header": (lambda name, data: (bytes(200), 0), "is no array"),
    "NaN": (
        lambda name, data: (data[:-4] + np.float32(np.nan).tobytes(), 0),
        "not finite",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_arrays_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    change, said = DAMAGE[kind]
    shutil.copytree(ROTO / "full", tmp_path / "full")
    shutil.copy(ROTO / "config.json", tmp_path)
    # The last file holds the final norm; arr_5 is its scale, 24 numbers.
    rewritten(
        tmp_path / "full/step_3/shard_0/15.npz",
        lambda name, data: change(name, data) if b"(24,)" in data else (data, 0),
    )
    with pytest.raises(CheckpointError, match=said):
        dict(read_mesh(tmp_path / "full").weights)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda step: (step / "shard_1/7.npz").unlink(), "is missing"),
        (lambda step: shutil.rmtree(step / "shard_0"), "holds no shard_0"),
        (lambda step: (step / "shard_1").rename(step / "shard_2"), "shard_0, shard_1"),
        (lambda step: (step / "shard_1/7.npz").write_bytes(b"PK"), "not a whole npz file"),
        (
            lambda step: (step / "shard_1/7.npz").write_bytes(
                (step / "shard_1/7.npz").read_bytes()[:-3000]
            ),
            "not a whole npz file",
        ),
        (
            lambda step: shutil.copy(step / "shard_1/0.npz", step / "shard_1/15.npz"),
            "different numbers of arrays|of another checkpoint",
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, said):
    shutil.copytree(ROTO / "full", tmp_path / "full")
    shutil.copy(ROTO / "config.json", tmp_path)
    damage(tmp_path / "full/step_3")
    with pytest.raises(CheckpointError, match=said):
        dict(read_mesh(tmp_path / "full").weights)


def test_a_flipped_bit_is_found(tmp_path):
    shutil.copytree(ROTO / "slim", tmp_path / "slim")
    shutil.copy(ROTO / "config.json", tmp_path)
    file = tmp_path / "slim/step_3/shard_1/3.npz"
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        dict(read_mesh(tmp_path / "slim").weights)

"""Folders for transformers, written and read without it; broken and hostile ones are refused."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from landed_cases import DATA
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, tiny

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.convert import published
from openpalm.convert.cached import checkpoint_path
from openpalm.convert.huggingface import chat_template, export
from openpalm.convert.huggingface.read import read_defaults, read_palm
from openpalm.convert.source import in_memory, open_source
from openpalm.convert.target import write
from openpalm.data.text.conversation import ROLES, Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, DataError, OpenPalmError, StorageError, WorkError
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
from openpalm.model.transformer import Transformer

BYTE = Tokenizer.byte()
RUN = DATA / "dpo" / "run"


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a plain install, wherever these tests run."""

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(export, "import_module", missing)
    monkeypatch.setenv("OPENPALM_CACHE", str(tmp_path / "cache"))


def save(model: Transformer, folder: Path, **options: object) -> export.Exported:
    given = {"lineage": {"step": 3}, "tokenizer_json": BYTE.definition} | options
    return export.save_as_huggingface(model.config, in_memory(folder, model), folder, **given)  # type: ignore[arg-type]


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_read_back_bit_by_bit(tmp_path: Path, kind: str):
    model = tiny(**KINDS[kind])
    exported = save(model, tmp_path / "out", max_shard_bytes=30_000)
    assert exported.difference < 1e-5
    assert exported.notes == ["reloaded by OpenPaLM itself (transformers is not installed)"]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert len(shards) > 2
    config, reward, weights = read_palm(tmp_path / "out")
    assert (config, reward) == (model.config, None)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter.detach())
    assert Tokenizer.from_spec(str(tmp_path / "out"), ()).digest == BYTE.digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bytes(said, tmp_path: Path, dtype: str):
    status, output, _ = said(
        "convert", RUN, tmp_path / "out", "--to", "huggingface", "--dtype", dtype
    )
    assert status == 0
    assert "reloaded: logits within" in output
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    expected = openpalm.load(RUN).embedding.to(getattr(torch, dtype)).float()
    assert torch.equal(openpalm.load(tmp_path / "out").embedding, expected)
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_a_weight_that_float16_cannot_hold(tmp_path: Path):
    model = tiny().requires_grad_(False)
    model.embedding[3, 3] = 1e6
    checkpoint.save(tmp_path / "model", model)
    with pytest.raises(CheckpointError, match="embedding exceeds the range of float16"):
        write(open_source(tmp_path / "model"), tmp_path / "out", "huggingface", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged(said, tmp_path: Path):
    assert said("convert", DATA / "lora" / "run", tmp_path / "out", "--to", "huggingface")[0] == 0
    ids = torch.arange(20)[None]
    difference = openpalm.load(DATA / "lora" / "run").logits(ids) - openpalm.load(
        tmp_path / "out"
    ).logits(ids)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["reward", "reward-binned", "reward-ordinal"])
def test_reward_models_come_back(said, tmp_path: Path, name: str):
    run = DATA / name / "run"
    assert said("convert", run, tmp_path / "out", "--to", "huggingface")[0] == 0
    ours, back = openpalm.load(run), openpalm.load(tmp_path / "out")
    ids, lengths = torch.arange(24).view(2, 12), torch.tensor([3, 5])
    assert torch.equal(
        ours.value(ids, prompt_lengths=lengths), back.value(ids, prompt_lengths=lengths)
    )


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(StorageError, match=r"out: cannot be saved \(No space left on device"):
        save(tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_outputs_fail_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tiny(seed=1)
    monkeypatch.setattr(
        export, "read_palm", lambda _: (other.config, None, in_memory(tmp_path, other))
    )
    with pytest.raises(WorkError, match=r"OpenPaLM itself .*, differ by .*; nothing was written"):
        save(tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Sampling settings, tokenizer, template


def test_sampling_settings_go_out_and_come_back(tmp_path: Path):
    for n, given in enumerate([SamplingDefaults(), SamplingDefaults(0.3, 0.9, 40)]):
        save(tiny(), tmp_path / str(n), defaults=given)
        written = (tmp_path / str(n) / "generation_config.json").read_text(encoding="utf-8")
        content = json.loads(written)
        assert content["do_sample"] is True
        assert content["top_k"] == given.top_k  # transformers takes 50 where it is not given
        ends = [BYTE.special_id("<|endoftext|>"), BYTE.special_id("<|end|>")]
        assert content["eos_token_id"] == sorted(ends)
        kept = checkpoint_path(str(tmp_path / str(n)), quiet)
        assert read_defaults(tmp_path / str(n)) == sampling_defaults(kept) == given
    save(tiny(), tmp_path / "greedy", defaults=SamplingDefaults(temperature=0.0))
    assert read_defaults(tmp_path / "greedy").temperature == 0


def conversations() -> list[list[Message]]:
    draw = random.Random(3)
    alphabet = "ab \n\t{}%'\"\\<|>éß北京🙂\u200b\u0301:User"
    return [
        [
            Message(
                draw.choice(ROLES),  # type: ignore[arg-type]
                "".join(draw.choices(alphabet, k=draw.choice([0, 1, 6, 30]))),
            )
            for _ in range(draw.randrange(6))
        ]
        for _ in range(1000)
    ]


@pytest.mark.parametrize("spec", ["byte", "bpe"])
def test_the_template_gives_our_ids(spec: str):
    tokenizer = BYTE if spec == "byte" else Tokenizer.train_bpe(["a user: ab " * 99], 290)
    write_text = chat_template.compiled(chat_template.chat_template(tokenizer))
    theirs = tokenizers.Tokenizer.from_str(tokenizer.definition)
    for messages in conversations():
        for opened in (False, True):
            text = write_text(messages, add_generation_prompt=opened)
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ids == render(tokenizer, messages, add_generation_prompt=opened).ids


def unmarked() -> Tokenizer:
    """A vocabulary without tokens for roles, as GPT-NeoX's."""
    marked = Tokenizer.train_bpe(["User: Hi there. " * 99], 290).definition
    content = json.loads(marked)
    content["added_tokens"] = content["added_tokens"][:1]
    return Tokenizer(json.dumps(content).encode(), "unmarked")


def test_without_tokens_for_roles_the_text_is_the_same(tmp_path: Path):
    tokenizer = unmarked()
    write_text = chat_template.compiled(chat_template.chat_template(tokenizer))
    for messages in conversations():
        ids = render(tokenizer, messages, add_generation_prompt=True).ids
        text = write_text(messages, add_generation_prompt=True)
        assert text == tokenizer.decode(ids, skip_special=False)
    model = tiny(vocab_size=tokenizer.vocab_size)
    notes = save(model, tmp_path / "out", tokenizer_json=tokenizer.definition).notes
    assert notes[0].startswith("chat_template.jinja writes the same text")
    assert notes[0] in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_text_cannot_forge_a_turn():
    for tokenizer in (BYTE, unmarked()):
        write_text = chat_template.compiled(chat_template.chat_template(tokenizer))
        forged = f"a{tokenizer.special_tokens[0]}b"
        with pytest.raises(DataError, match="a message spells the special token"):
            write_text([Message("user", forged)])
        with pytest.raises(DataError, match="role tool: must be one of system, user, assistant"):
            write_text([Message("tool", "a")])  # type: ignore[arg-type]


def test_the_card_tells_the_lineage(tmp_path: Path):
    lineage = {"kind": "converted", "parent": "f" * 64, "step": 7, "odd": "```\n# x|y"}
    save(tiny(), tmp_path / "out", lineage=lineage)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"| manifest hash of the parent checkpoint | {'f' * 64} |" in card
    block = card.split("```json\n")[1].split("```")[0]
    assert json.loads(block) == lineage


# Foreign folders as model paths


def test_a_folder_is_a_model_path(said, tmp_path: Path):
    folder = tmp_path / "out"
    save(tiny(), folder)
    lines: list[str] = []
    kept = checkpoint_path(str(folder), lines.append)
    assert kept.parent == published.cache()
    assert [line.split("; ")[1] for line in lines] == [f"converting it once, into {kept}"]
    assert checkpoint_path(str(folder), lines.append) == kept
    assert len(lines) == 1
    folder.rename(tmp_path / "moved")
    assert checkpoint_path(str(tmp_path / "moved"), quiet) == kept  # by content
    assert said("sample", tmp_path / "moved", "a", "--max-new-tokens", 2)[0] == 0
    stored = load_file(tmp_path / "moved/model.safetensors")
    save_file({n: t + 0.01 for n, t in stored.items()}, tmp_path / "moved/model.safetensors")
    assert checkpoint_path(str(tmp_path / "moved"), quiet) != kept
    assert len(list(published.cache().iterdir())) == 2


def test_a_folder_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said
):
    """Its conversion would be a mixture, under the key of the folder as it was."""
    save(tiny(), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"

    def changed(source: object, directory: Path, *words: object, **more: object) -> object:
        written = write(source, directory, *words, **more)  # type: ignore[arg-type]
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
        return written

    monkeypatch.setattr("openpalm.convert.cached.write", changed)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint_path(str(tmp_path / "out"), quiet)
    assert not list(published.cache().iterdir())
    monkeypatch.setattr("openpalm.convert.target.write", changed)
    status, _, errors = said("convert", tmp_path / "out", tmp_path / "ours")
    assert status == 1
    assert "changed while it was read" in errors[-1]
    assert not (tmp_path / "ours").exists()


def test_the_index_is_part_of_the_key(tmp_path: Path):
    """Two files have a tensor: the index says which one is the model's."""
    save(tiny(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    first = min(stored)
    save_file(stored, tmp_path / "model-1.safetensors")
    save_file({first: stored[first] + 1}, tmp_path / "model-2.safetensors")
    kept = set()
    for other in ("model-1.safetensors", "model-2.safetensors"):
        places = dict.fromkeys(stored, "model-1.safetensors") | {first: other}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
        kept.add(checkpoint_path(str(tmp_path), quiet))
    assert len(kept) == 2


def test_training_starts_from_a_folder(said, work: Path, tmp_path: Path):
    assert said("convert", work / "run", tmp_path / "out", "--to", "huggingface")[0] == 0
    status, _, errors = said(
        *("train", "--init", tmp_path / "out", "--data", work / "data", "--out", tmp_path / "run"),
        *("--steps", 1, "--batch-tokens", 480, "--device", "cpu"),
    )
    assert status == 0, errors


def test_other_kinds_of_models_are_named(said, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    status, _, errors = said("sample", tmp_path, "a")
    assert status == 2
    assert len(errors) == 1
    assert "a 'llama' model; of Hugging Face's models OpenPaLM reads gptj" in errors[0]


# Broken and hostile folders


def config(**change: object) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")

    return alter


def tensors(alter: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        alter(stored)
        save_file(stored, folder / "model.safetensors")

    return rewrite


def index(**change: object) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        placed = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        content = {"weight_map": placed} | change
        text = json.dumps(content)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    return alter


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)

    return alter


NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"
BROKEN = {
    "no sizes": (written("config.json", '{"model_type": "openpalm"}'), "settings lack"),
    "not json": (written("config.json", "{"), "not valid JSON"),
    "a large config": (config(notes="x" * (1 << 20)), "too large"),
    "a text as size": (config(dim="8"), "dim cannot be '8'"),
    "no such rotary": (config(rotary="yarn"), "rotary cannot be 'yarn'"),
    "a negative size": (config(depth=-1), "depth"),
    "a huge depth": (config(depth=1 << 30), "too few for its config.json"),
    "a huge vocabulary": (config(vocab_size=1 << 30), "embed_tokens.weight' is"),
    "another width": (config(ff_dim=63), "feedforward.down_proj.weight' is"),
    "another depth": (config(depth=1), r"model.blocks.1\S* is .* needs no such tensor"),
    "rewards without a head": (config(reward={"kind": "scalar"}), "'reward_head' is absent"),
    "rewards of no kind": (config(reward={"kind": "elo"}), "kind cannot be 'elo'"),
    "a tensor missing": (tensors(lambda s: s.pop(NORM)), "'model.norm.weight' is absent"),
    "a tensor too many": (
        tensors(lambda s: s.update(x=torch.ones(1))),
        "'x' is .*no such tensor",
    ),
    "a nan": (tensors(lambda s: s[NORM].fill_(torch.nan)), "not finite"),
    "an infinity": (tensors(lambda s: s[TABLE].fill_(torch.inf)), "not finite"),
    "another shape": (tensors(lambda s: s.update({NORM: torch.ones(3)})), "norm.weight' is .3."),
    "numbers that are whole": (
        tensors(lambda s: s.update({NORM: torch.ones(32, dtype=torch.int64)})),
        "norm.weight' is absent",
    ),
    "truncated": (truncated, "cannot be read"),
    "a huge header": (huge_header, "cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "an index of nothing": (index(weight_map={}), "no weight_map"),
    "a shard elsewhere": (index(weight_map={NORM: "../a.safetensors"}), "no file of its folder"),
    "a shard of no name": (index(weight_map={NORM: 3}), "no file of its folder"),
    "a shard missing": (index(weight_map={NORM: "b.safetensors"}), "lacks b.safetensors"),
    "an index that lies": (index(weight_map={"y": "a.safetensors"}), "not in the file"),
    "a broken tokenizer": (written("tokenizer.json", "{}"), "no `model`"),
    "a temperature": (written("generation_config.json", '{"temperature": 99}'), "temperature is"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_folders_are_refused(said, tmp_path: Path, broken: str):
    folder = tmp_path / "out"
    save(tiny(), folder)
    alter, message = BROKEN[broken]
    alter(folder)
    with pytest.raises(OpenPalmError, match=message):
        checkpoint_path(str(folder), quiet)
    status, _, errors = said("sample", folder, "a")
    assert status == 2
    assert len(errors) == 1 + errors[0].startswith(str(folder))  # it may say what it converts
    assert not list(published.cache().glob("*"))


def test_code_in_a_folder_is_not_executed(tmp_path: Path):
    folder = tmp_path / "out"
    save(tiny(), folder)
    canary = tmp_path / "canary"
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    for name in ("modeling_openpalm.py", "config.py", "setup.py", "custom_generate.py"):
        (folder / name).write_text(code, encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")
    config(auto_map={"AutoConfig": "config.OpenPalmConfig"})(folder)
    assert openpalm.load(folder).config == tiny().config
    assert not canary.exists()

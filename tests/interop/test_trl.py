"""TRL's trainers take the exports: their checks, their preparation, one step of training."""

import pytest
from judgements import DIALOGUE, every_kind

from openpalm.data.rows.exports.stream import write_export
from openpalm.data.rows.preferences import (
    labelled_completions_from_preferences,
    pairs_from_preferences,
)

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from trl import data_utils  # noqa: E402

# TRL and transformers announce their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

RECORDS = [*every_kind(), *every_kind(DIALOGUE, start=20)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(marks)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def model(tokenizer, tmp_path):
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    # The trainers load the reference from the place that the model came from.
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")


def load(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    write_export(path, RECORDS, name)
    cache = str(tmp_path / "cache")
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)


def rendered(messages):
    return "".join(f"<|{m.role}|>{m.content}<|end|>" for m in messages)


def arguments(kind, tmp_path, **given):
    return kind(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        **given,
    )


@pytest.mark.parametrize(
    ("name", "conversational"),
    [("pairs", True), ("conversations", True), ("hh", False), ("kto", True), ("messages", True)],
)
def test_trl_knows_which_exports_are_conversations(tmp_path, name, conversational):
    assert data_utils.is_conversational(load(tmp_path, name)[0]) is conversational


def test_trl_finds_the_prompt_of_whole_conversations(tmp_path):
    explicit, whole = load(tmp_path, "pairs"), load(tmp_path, "conversations")
    for stated, joined in zip(explicit, whole, strict=True):
        found = data_utils.maybe_extract_prompt(joined)
        assert all(found[side] == stated[side] for side in ("prompt", "chosen", "rejected"))


def test_trl_finds_the_prompt_of_hh_texts(tmp_path):
    for row in load(tmp_path, "hh"):
        assert data_utils.maybe_extract_prompt(row)["prompt"].startswith("\n\nHuman: Sky?")


def test_trl_unpairs_pairs_as_we_do(tmp_path):
    theirs = data_utils.unpair_preference_dataset(load(tmp_path, "pairs"))
    keep = ("prompt", "completion", "label")
    ours = load(tmp_path, "kto-pairs")
    as_rows = [[str([row[k] for k in keep]) for row in rows] for rows in (theirs, ours)]
    assert sorted(as_rows[0]) == sorted(as_rows[1])


def test_trl_renders_the_chat_template(tmp_path, tokenizer):
    pairs = pairs_from_preferences(RECORDS).items
    texts = [data_utils.apply_chat_template(row, tokenizer) for row in load(tmp_path, "pairs")]
    assert sorted(text["prompt"] + text["chosen"] for text in texts) == sorted(
        rendered(pair.prompt + pair.chosen) for pair in pairs
    )


@pytest.mark.parametrize("name", ["pairs", "conversations", "hh"])
def test_dpo_trainer_takes_pairs(tmp_path, tokenizer, model, name):
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path),
        train_dataset=load(tmp_path, name),
        processing_class=tokenizer,
    )
    prepared = trainer.train_dataset
    pairs = pairs_from_preferences(RECORDS).items
    if name != "hh":
        seen = sorted(tokenizer.decode(r["prompt_ids"] + r["chosen_ids"]) for r in prepared)
        assert seen == sorted(rendered(pair.prompt + pair.chosen) for pair in pairs)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)  # log 2 at the start


@pytest.mark.parametrize("name", ["kto", "kto-pairs", "pairs"])
def test_kto_trainer_takes_labels(tmp_path, tokenizer, model, name):
    trainer = trl.KTOTrainer(
        model=model,
        args=arguments(trl.KTOConfig, tmp_path),
        train_dataset=load(tmp_path, name),
        processing_class=tokenizer,
    )
    prepared = trainer.train_dataset
    if name == "kto":
        labelled = labelled_completions_from_preferences(RECORDS).items
        seen = [tokenizer.decode(r["prompt_ids"] + r["completion_ids"]) for r in prepared]
        assert sorted(zip(seen, prepared["label"], strict=True)) == sorted(
            (rendered(c.prompt + c.completion), c.good) for c in labelled
        )
    else:
        assert len(prepared) == 2 * len(pairs_from_preferences(RECORDS).items)
    assert trainer.train().training_loss == pytest.approx(0.5, abs=1e-2)  # sigmoid(0) at the start

"""A failure of the model or its tokenizer ends one request; the server continues."""

import json
import shutil

import pytest
import safetensors.torch as st
import torch
from altered import seal
from command_line import write_base
from servers import events, serving

from openpalm.checkpoint import directory as checkpoint
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults

# A panic's traceback could fill the pipe, which the tests do not read.
ADMIN = {"OPENPALM_ADMIN_KEY": "boss", "RUST_BACKTRACE": "0"}
HELLO = {"prompt": "Hello", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
FATAL = "a" * 40 + "b"
"""The tokenizer of `panicking` panics at this text."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model with NaN weights."""
    directory = write_base(tmp_path_factory.mktemp("nan") / "broken")
    weights = st.load_file(directory / "model.safetensors")
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    st.save_file(nan, directory / "model.safetensors")
    return seal(directory)


@pytest.fixture(scope="module")
def spoilt(broken):
    """A server that was started on that model; /admin/models refuses it."""
    with serving(broken, "--dtype", "float32", env=ADMIN) as running:
        yield running


@pytest.fixture(scope="module")
def panicking(tmp_path_factory):
    """A model with a tokenizer that panics on some texts: its regex backtracks without end."""
    directory = write_base(tmp_path_factory.mktemp("panic") / "panicking")
    content = json.loads((directory / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    parts = [split | {"invert": False}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return seal(directory)


@pytest.fixture(scope="module")
def swapping(base):
    with serving(base, "--dtype", "float32", env=ADMIN) as running:
        yield running


def swap(server, directory):
    return server.call("/admin/models", {"path": str(directory)}, key="boss")


@pytest.fixture
def served(swapping, base):
    yield swapping
    assert swap(swapping, base).status == 200
    assert swapping.call("/v1/completions", HELLO).status == 200
    swapping.wait_idle()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", HELLO | {"temperature": 0}),
        ("/v1/completions", HELLO | {"temperature": 0, "logprobs": 2, "n": 2}),
        ("/v1/completions", HELLO | {"max_tokens": 0, "echo": True, "logprobs": 2}),
        ("/v1/chat/completions", CHAT | {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
        ("/complete", {"context": "Hello", "temp": 0}),
        ("/v1/score", {"sequences": ["Hello"]}),
    ],
)
def test_a_model_of_nan_gets_status_503(spoilt, path, body):
    answer = spoilt.call(path, body, key="boss")
    assert answer.status == 503
    assert "finite" in answer.body["error"]["message"]
    assert answer.body["error"]["type"] == "service_unavailable_error"


def test_a_model_of_nan_is_not_loaded(served, broken):
    answer = swap(served, broken)
    assert answer.status == 400
    assert "finite" in answer.body["error"]["message"]


@pytest.mark.parametrize("body", [HELLO, HELLO | {"n": 8, "top_p": 0.5, "seed": 1}])
def test_nothing_is_sampled_from_nan(spoilt, body):
    assert spoilt.call("/v1/completions", body).status == 503


def test_a_stream_of_nan_ends_with_the_error(spoilt):
    answer = spoilt.call("/v1/completions", HELLO | {"stream": True, "temperature": 0})
    (error,) = events(answer.body)
    assert error["error"]["type"] == "service_unavailable_error"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": FATAL}),
        ("/v1/completions", {"prompt": FATAL * 600}),  # encoded in another thread
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": FATAL}]}),
        ("/tokenize", {"prompt": FATAL}),
        ("/complete", {"context": FATAL}),
        ("/v1/score", {"sequences": [FATAL]}),
    ],
)
def test_a_tokenizer_panic_gets_status_400(served, panicking, path, body):
    assert swap(served, panicking).status == 200
    answer = served.call(path, body, key="boss")
    assert answer.status == 400
    assert answer.body["error"]["type"] == "invalid_request_error"


def _long_name(directory):
    entry = {"bytes": 1, "sha256": "0"}
    seal(directory, lambda body: body["files"].update({"x" * 300: entry}))


def _no_pickle(directory):
    (directory / "model.safetensors").write_bytes(b"\x80\x04")
    seal(directory)


def _deep_config(directory):
    (directory / "config.json").write_text("[" * 100_000)
    seal(directory)


def _odd_settings(directory):
    (directory / "generation_config.json").write_text('{"temperature": "hot"}')


@pytest.mark.parametrize("spoil", [_long_name, _no_pickle, _deep_config, _odd_settings])
def test_a_hostile_checkpoint_is_not_served(served, base, tmp_path, spoil):
    shutil.copytree(base, tmp_path / "hostile")
    spoil(tmp_path / "hostile")
    answer = swap(served, tmp_path / "hostile")
    assert answer.status == 400
    assert len(answer.body["error"]["message"]) < 1000
    assert served.call("/v1/models").body["data"][0]["id"] == "base"


# --- sampling defaults


def test_the_models_sampling_defaults_are_used(served, base, tmp_path):
    shutil.copytree(base, tmp_path / "own")
    own = {"temperature": 0.0, "top_k": 3, "eos_token_id": 2}
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps(own))
    assert swap(served, tmp_path / "own").status == 200
    (model,) = served.call("/v1/models/").body["data"]
    assert model["sampling"] == {"temperature": 0.0, "top_p": 1.0, "top_k": 3}
    assert model["takes_conversations"] is False
    greedy = served.call("/v1/completions", HELLO | {"temperature": 0}).body["choices"]
    assert served.call("/v1/completions", HELLO).body["choices"] == greedy


def test_sampling_defaults_come_from_the_run_or_the_card(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    assert sampling_defaults(step) == SamplingDefaults(0.8, 1.0, 0)
    card = "---\nlicense: mit\ninference:\n  parameters:\n    temperature: 0.3\n---\n# Model card\n"
    (step / "card.md").write_text(card)
    assert sampling_defaults(step) == SamplingDefaults(temperature=0.3)
    (tmp_path / "run" / "generation_config.json").write_text('{"top_p": 0.5, "temperature": null}')
    assert sampling_defaults(step) == SamplingDefaults(top_p=0.5)


@pytest.mark.parametrize(
    "text", ['{"temperature": 2.5}', '{"top_p": 0}', '{"top_k": 1.5}', "[1]", "{", "[" * 100_000]
)
def test_invalid_sampling_defaults_are_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match="generation_config"):
        sampling_defaults(tmp_path)

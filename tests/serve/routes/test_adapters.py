"""Several adapters over one model: names, answers, added and removed while the server runs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from adapters import ALL, QV, write_adapter
from command_line import write_base
from servers import serving

from openpalm.checkpoint import directory as checkpoint
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

KEYS = {"OPENPALM_ADMIN_KEY": "boss"}


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """Each served model by its name, and the folder with the adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {"base": checkpoint.load(base)}
    for seed, (name, config) in enumerate([("maths", ALL), ("poetry", QV), ("later", ALL)]):
        found[name] = write_adapter(folder / name, base, config, seed)
    return found, folder


@pytest.fixture(scope="module")
def adapter_server(base, models):
    folder = models[1]
    options = ("--adapter", f"sums={folder / 'maths'}", "--adapter", folder / "poetry")
    with serving(base, "--dtype", "float32", *options, env=KEYS) as running:
        yield running


def ask(server, name, **more):
    body = {"prompt": "Hello, who", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return server.call("/v1/completions", body | ({"model": name} if name else {}) | more)


def expected(models, tokenizer, name):
    request = Request(tokenizer.encode("Hello, who"), 12, Sampling(temperature=0))
    return tokenizer.decode(Engine(models[0][name]).completions([request])[0])


def names(server):
    return [model["id"] for model in server.call("/v1/models").body["data"]]


def test_each_name_is_a_model(adapter_server, models, tokenizer):
    listed = adapter_server.call("/v1/models").body["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [
        ("base", None),
        ("sums", "base"),
        ("poetry", "base"),
    ]
    assert adapter_server.call("/v1/models/sums").body["parent"] == "base"
    wanted = {None: "base", "base": "base", "sums": "maths", "poetry": "poetry"}
    texts = {name: expected(models, tokenizer, model) for name, model in wanted.items()}
    assert len(set(texts.values())) == 3
    # All at once and more than once, so that one batch has rows of every model.
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda name: (name, ask(adapter_server, name)), [*wanted] * 4))
    for name, answer in answers:
        assert answer.body["model"] == name or name is None
        assert answer.body["choices"][0]["text"] == texts[name]


def test_an_unknown_name_lists_the_served_ones(adapter_server):
    answer = ask(adapter_server, "maths")
    assert answer.status == 404
    assert "'base', 'sums', 'poetry'" in answer.body["error"]["message"]


def test_scores_and_chat_use_the_adapter(adapter_server, models):
    ids = list(range(60, 80))
    answer = adapter_server.call("/v1/score", {"model": "sums", "sequences": [ids]}, key="boss")
    found = Engine(models[0]["maths"]).score([ids])[0].tolist()
    assert answer.body["data"][0]["log_probs"] == pytest.approx(found, abs=1e-3)
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    said = {
        name: adapter_server.call("/v1/chat/completions", chat | {"model": name}).body
        for name in ("base", "sums")
    }
    assert said["base"]["choices"] != said["sums"]["choices"]


def test_an_adapter_is_added_and_removed_while_the_server_runs(adapter_server, models, tokenizer):
    add = {"path": str(models[1] / "later")}
    assert adapter_server.call("/admin/adapters", add).status == 401
    answer = adapter_server.call("/admin/adapters", add, key="boss")
    assert answer.body == {"model": "later", "parent": "base"}
    text = ask(adapter_server, "later").body["choices"][0]["text"]
    assert text == expected(models, tokenizer, "later")
    again = adapter_server.call("/admin/adapters", add, key="boss")
    assert (again.status, again.body["error"]["param"]) == (400, "name")

    def remove(key):
        return adapter_server.call("/admin/adapters/later", key=key, method="DELETE")

    assert remove(None).status == 401
    assert remove("boss").body == {"removed": "later"}
    assert names(adapter_server) == ["base", "sums", "poetry"]
    assert ask(adapter_server, "later").status == 404
    assert remove("boss").status == 404
    # Another adapter of the same name does not find the cache of the first.
    replaced = {"path": str(models[1] / "maths"), "name": "later"}
    adapter_server.call("/admin/adapters", replaced, key="boss")
    text = ask(adapter_server, "later").body["choices"][0]["text"]
    assert text == expected(models, tokenizer, "maths")
    remove("boss")


def test_an_adapter_that_does_not_fit_changes_nothing(adapter_server, tmp_path):
    other = write_base(tmp_path / "other", context=64)
    write_adapter(tmp_path / "foreign", other, QV, 0)
    for path in (tmp_path / "foreign", tmp_path / "none", "\0"):
        answer = adapter_server.call("/admin/adapters", {"path": str(path)}, key="boss")
        assert (answer.status, answer.body["error"]["param"]) == (400, "path")
    assert names(adapter_server) == ["base", "sums", "poetry"]


def test_a_replaced_model_takes_its_adapters_along(adapter_server, base, models):
    swap = adapter_server.call("/admin/models", {"path": str(base), "name": "new"}, key="boss")
    removed = ["sums", "poetry"]
    assert swap.body == {"model": "new", "replaced": "base", "removed_adapters": removed}
    assert names(adapter_server) == ["new"]
    add = {"path": str(models[1] / "maths")}
    answer = adapter_server.call("/admin/adapters", add, key="boss")
    assert answer.body == {"model": "maths", "parent": "new"}
    back = adapter_server.call("/admin/models", {"path": str(base)}, key="boss")
    assert back.body == {"model": "base", "replaced": "new", "removed_adapters": ["maths"]}
    for name, folder in (("sums", "maths"), ("poetry", "poetry")):
        add = {"path": str(models[1] / folder), "name": name}
        assert adapter_server.call("/admin/adapters", add, key="boss").status == 200

"""Runs as a page shows them: made-up directories, and a reader of pages."""

import json
from html.parser import HTMLParser

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror="x()">&amp;'
VOID = {"meta", "br", "img", "link", "path", "use", "rect", "circle", "line", "input"}


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; refuses what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


def row(step, **more):
    values = {"loss": 6 / step, "tokens": 1000 * step, "elapsed_s": 30.0 * step}
    return {"step": step, **values, "tokens_per_s": 100.0 + step, "mfu": 0.25, **more}


def evaluation(step):
    return {"step": step, "val_loss": 7.77 / step, "val_bits_per_byte": 3.25 / step}


def make_run(path, rows=None, samples=None, config="model: palm-tiny\noptim:\n  lr: 0.0625\n"):
    path.mkdir(parents=True)
    rows = rows or [*(row(i) for i in range(1, 21)), evaluation(10), evaluation(20)]
    texts = {"metrics.jsonl": rows, "samples.jsonl": samples or []}
    for name, content in texts.items():
        if content:
            lines = "".join(json.dumps(line) + "\n" for line in content)
            (path / name).write_text(lines, encoding="utf-8")
    (path / "config.yaml").write_text(config, encoding="utf-8")
    return path

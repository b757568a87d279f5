"""The chat template as Jinja, for `tokenizer.apply_chat_template` and servers that use it.

It writes the text of the token ids that data/text/conversation.py renders. That module places
special tokens itself; a Jinja template can only write their names into the text, so a message that
spells a special token is refused.
"""

import json
from collections.abc import Sequence
from typing import Any

from openpalm.data.text.conversation import END, ROLES, Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError

_CHECKS = """\
{%- if message['role'] not in ROLES -%}
{{- raise_exception('role ' + message['role']|string + ': must be one of ' + ROLES|join(', ')) -}}
{%- endif -%}
{%- if message['content'] is not string -%}
{{- raise_exception('content must be a string') -}}
{%- endif -%}
{%- for token in SPECIAL -%}
{%- if token in message['content'] -%}
{{- raise_exception('a message spells the special token ' + token) -}}
{%- endif -%}
{%- endfor -%}
"""
_MARKED = (
    "{{- '<|' + message['role'] + '|>' + message['content'] + END -}}\n",
    "{{- '<|assistant|>' -}}",
)
_UNMARKED = (
    "{{- message['role']|capitalize + ': ' + message['content'] -}}\n"
    "{{- ASSISTANT_END if message['role'] == 'assistant' else '\\n\\n' -}}\n",
    "{{- 'Assistant: ' -}}",
)

_SAMPLES = (
    [Message("user", "Hi")],
    [Message("system", "Be brief. "), Message("user", " What is 2 + 2?\n"), Message("user", "")],
    [
        Message("user", "Ünïcödé 北京 🙂"),
        Message("assistant", "\n\tyes  \n"),
        Message("user", "why"),
    ],
    [Message("assistant", "I begin."), Message("assistant", ""), Message("system", "  ")],
)


def chat_template(tokenizer: Tokenizer) -> str:
    """The template for this vocabulary."""
    marked = all(tokenizer.special_id(name) is not None for name in (END, *map(_marker, ROLES)))
    turn, opening = _MARKED if marked else _UNMARKED
    end = tokenizer.end_of_text
    assistant_end = "\n\n" if end is None else token_text(tokenizer, end)
    constants = {
        "ROLES": list(ROLES),
        "SPECIAL": tokenizer.special_tokens,
        **({"END": END} if marked else {"ASSISTANT_END": assistant_end}),
    }
    lines = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in constants.items()]
    lines += ["{%- for message in messages -%}", f"{_CHECKS}{turn}{{%- endfor -%}}"]
    lines += [f"{{%- if add_generation_prompt -%}}{opening}{{%- endif -%}}"]
    return "\n".join(lines)


def difference(tokenizer: Tokenizer, definition: str, template: str) -> str | None:
    """How ids by the template differ from `render`'s on sample conversations; None if they agree.

    definition: the tokenizer.json that users of the template load.
    """
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(definition)
    write = compiled(template)
    for messages in _SAMPLES:
        for opened in (False, True):
            ours = render(tokenizer, messages, add_generation_prompt=opened).ids
            text = write(messages, add_generation_prompt=opened)
            if theirs.encode(text, add_special_tokens=False).ids != ours:
                return f"the token ids of {text!r:.60} differ"
    return None


def compiled(template: str) -> Any:
    """A function (messages, add_generation_prompt) -> text, by the same Jinja as transformers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise DataError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    parsed = environment.from_string(template)

    def write(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        rows = [{"role": message.role, "content": message.content} for message in messages]
        return parsed.render(messages=rows, add_generation_prompt=add_generation_prompt)

    return write


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text that stands for a special token."""
    return tokenizer.decode([token_id], skip_special=False)


def _marker(role: str) -> str:
    return f"<|{role}|>"


def _literal(value: object) -> str:
    # JSON strings are Jinja strings, escapes included.
    return json.dumps(value, ensure_ascii=False)

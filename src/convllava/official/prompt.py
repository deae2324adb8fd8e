"""The prompt formats of published checkpoints, as chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convllava.errors import InputError

_TEXT = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
        {%- for image in images -%}{{- '<image> \\n' -}}{%- endfor -%}
        {{- texts | trim if images else texts -}}
    {%- endif -%}
{%- endmacro -%}
"""
"""The original tokenises what follows an image alone, so that it begins with a space of its own: the space after
`<image>`. The one after `<s>` is that of the beginning of a text."""

_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system, turns = text_of(messages[0]), messages[1:] -%}
{%- else -%}
    {%- set system, turns = 'SYSTEM', messages -%}
{%- endif -%}
"""

_V1 = """\
{{- '<s> ' ~ system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ text_of(message) ~ '</s>' -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}{{- 'USER: ' ~ text_of(message) -}}
    {%- else -%}{{- raise_exception('a system message stands first or nowhere') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""

_LLAMA_2 = """\
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' ~ text_of(message) ~ ' </s>' -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}
        {{- '<s> [INST] ' ~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if loop.first else '') -}}
        {{- text_of(message) ~ ' [/INST]' -}}
    {%- else -%}{{- raise_exception('a system message stands first or nowhere') -}}
    {%- endif -%}
{%- endfor -%}
"""

_PLAIN = """\
{{- '<s> ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- text_of(message) ~ '\\n' -}}{%- endgeneration -%}
    {%- else -%}{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image> ' -}}{%- endfor -%}
    {%- endif -%}
{%- endfor -%}
"""


def _template(body: str, system: str) -> str:
    return _TEXT + _SYSTEM.replace("'SYSTEM'", '"' + system + '"') + body


TEMPLATES = {
    "v1": _template(
        _V1,
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
    ),
    "llama_2": _template(
        _LLAMA_2,
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
    ),
    "plain": _template(_PLAIN, ""),
}
"""By LLaVA's names: Vicuna's, Llama 2's, and that of captions alone (an image and nothing else asks for one)."""
_OTHER_NAMES = {"llava_v1": "v1", "vicuna_v1": "v1", "llama_v2": "llama_2", "llava_llama_2": "llama_2"}
_KEYS = ("conv_version", "conv_mode", "version")
"""Under which a configuration may name its format; the original code writes none of them and trains with v1."""


def template_of(config: Mapping[str, Any]) -> str:
    """The chat template of a checkpoint by its configuration, v1 where it names no format.

    Raises:
        InputError: a format that is not known.
    """
    named = next((config[key] for key in _KEYS if isinstance(config.get(key), str)), "v1")
    name = _OTHER_NAMES.get(named, named)
    if name not in TEMPLATES:
        raise InputError(f"config.json names the prompt format {named!r}; known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]

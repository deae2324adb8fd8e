"""The prompt formats of published checkpoints, as chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convllava.errors import InputError

_OPENING = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}
            {{- '<image>' ~ ('' if loop.last and not texts else ' \\n') -}}
        {%- endfor -%}
        {{- texts -}}
    {%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- set system = 'SYSTEM' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}
    {%- set system = text_of(messages[0]) -%}
{%- endif -%}
"""
"""The original tokenises what follows an image alone, so that it begins with a space of its own: the space after
`<image>`. The one after the token that begins a text is that of the beginning of a text.

vLLM takes a template for one that knows nothing of images unless it finds a loop over the messages, or over what one
variable is set to of them, and in it a loop over the parts."""

_BODIES = {
    "vicuna": """\
{{- BOS ~ ' ' ~ system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ text_of(message) ~ EOS -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}{{- 'USER: ' ~ text_of(message) -}}
    {%- else -%}{{- raise_exception('a system message stands first or nowhere') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
""",
    "llama_2": """\
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' ~ text_of(message) ~ ' ' ~ EOS -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}
        {{- BOS ~ (' ' if loop.first else '') ~ '[INST] ' -}}
        {{- '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if loop.first and system else '' -}}
        {{- text_of(message) ~ ' [/INST]' -}}
    {%- else -%}{{- raise_exception('a system message stands first or nowhere') -}}
    {%- endif -%}
{%- endfor -%}
""",
    "plain": """\
{{- BOS -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' ~ text_of(message) ~ '\\n' -}}{%- endgeneration -%}
    {%- else -%}{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {%- endif -%}
{%- endfor -%}
""",
}
_POLITE = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_VICUNA = "A chat between a curious {0} and an artificial intelligence assistant. " + _POLITE
_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
FORMATS = {
    "v1": ("vicuna", _VICUNA.format("user")),
    "vicuna_v1": ("vicuna", _VICUNA.format("user")),
    "llava_v1": ("vicuna", _VICUNA.format("human")),
    "llava_llama_2": ("llama_2", _LLAVA),
    "plain": ("plain", ""),
}
"""LLaVA's names of the formats -> which template, and what it says where no system message does."""
_KEYS = ("conv_version", "conv_mode", "version")
"""Under which a configuration may name its format; the original code writes none of them and trains with v1."""


def template(name: str = "v1", bos: str = "'<s>'", eos: str = "'</s>'") -> str:
    """A format as a chat template.

    Args:
        name: One of `FORMATS`.
        bos, eos: Jinja expressions of the tokens that begin a text and end an answer.
    """
    body, system = FORMATS[name]
    opening = _OPENING.replace("'SYSTEM'", f'"{system}"')
    return opening + _BODIES[body].replace("BOS", bos).replace("EOS", eos)


def template_of(config: Mapping[str, Any]) -> str:
    """The chat template of a checkpoint by its configuration, v1 where it names no format.

    Raises:
        InputError: a format that is not known.
    """
    name = next((config[key] for key in _KEYS if isinstance(config.get(key), str)), "v1")
    if name not in FORMATS:
        raise InputError(f"config.json names the prompt format {name!r}; known are {', '.join(FORMATS)}")
    return template(name)

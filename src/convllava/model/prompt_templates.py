"""Prompt formats as chat templates, for new models and for published checkpoints."""

from collections.abc import Mapping
from typing import Any

from convllava.errors import CheckpointError

CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- ' ' ~ message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<image>' if part['type'] == 'image' else ' ' ~ part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}{%- generation -%}{{- text_of(message) ~ '<|end|>' -}}{%- endgeneration -%}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- '<|' ~ message['role'] ~ '|>' ~ text_of(message) -}}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message['role'] ~ '; known: system, user, assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
"""`<|user|><image> QUESTION<|assistant|> ANSWER<|end|>`. Training supervises the answer and its end. Every text begins
with a space, so that a word is the same token everywhere (see `tokenizer.py`)."""

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
"""The original code tokenises the text after an image separately, so that it begins with a space of its own: the space
after `<image>`. In the same way the space after the first token of a text marks the start of the text.

vLLM recognises that a template handles images only if it finds a loop over the messages (or over one variable that is
set from them) with a loop over the parts inside."""

_BODIES = {
    "vicuna": """\
{{- BOS ~ ' ' ~ system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ text_of(message) ~ EOS -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}{{- 'USER: ' ~ text_of(message) -}}
    {%- else -%}{{- raise_exception('a system message must be the first message') -}}
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
    {%- else -%}{{- raise_exception('a system message must be the first message') -}}
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
"""LLaVA's name of a format -> its template, and its default system message."""
_KEYS = ("conv_version", "conv_mode", "version")
"""Keys of config.json that may name the format. The original code writes none of them and trains with v1."""


def template(name: str = "v1", bos: str = "'<s>'", eos: str = "'</s>'") -> str:
    """Return a prompt format as a chat template.

    Args:
        name: One of `FORMATS`.
        bos, eos: Jinja expressions for the first token of a text and the last token of an answer.
    """
    body, system = FORMATS[name]
    opening = _OPENING.replace("'SYSTEM'", f'"{system}"')
    return opening + _BODIES[body].replace("BOS", bos).replace("EOS", eos)


def template_of(config: Mapping[str, Any]) -> str:
    """Return the chat template of a checkpoint; v1 if its config.json names no format.

    Raises:
        CheckpointError: if the format is not known.
    """
    name = next((config[key] for key in _KEYS if isinstance(config.get(key), str)), "v1")
    if name not in FORMATS:
        raise CheckpointError(f"config.json names the prompt format {name!r}; known are {', '.join(FORMATS)}")
    return template(name)

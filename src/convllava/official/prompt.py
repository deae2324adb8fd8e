"""The prompt of published checkpoints, as a chat template."""

from __future__ import annotations

V1_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
        {%- for image in images -%}{{- '<image> \\n' -}}{%- endfor -%}
        {{- texts | trim if images else texts -}}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system, turns = text_of(messages[0]), messages[1:] -%}
{%- else -%}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions." -%}
    {%- set turns = messages -%}
{%- endif -%}
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
"""Prompt v1. The original tokenises what follows an image alone, so that it begins with a space of its own: the space
after `<image>`. The one after `<s>` is that of the beginning of a text."""

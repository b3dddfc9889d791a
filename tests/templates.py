"""Chat templates after the formats of well-known model families, in our own words and without generation markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftune.data.chat import CHATML, PLAIN

LLAMA3 = r"""
{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{%- set named = messages and messages[0]['role'] == 'system' %}
{{- bos_token + header('system') + 'Knowledge ends in May.\n\n' }}
{{- messages[0]['content'] | trim if named }}{{ '<|eot_id|>' }}
{%- for m in (messages[1:] if named else messages) %}
    {%- if 'tool_calls' in m %}
        {%- if m['tool_calls'] | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}
        {%- set call = m['tool_calls'][0]['function'] %}
        {{- header('assistant') + '{"name": "' + call['name'] + '", "parameters": ' }}
        {{- call['arguments'] | tojson + '}' }}
    {%- elif m['role'] == 'tool' %}
        {{- header('ipython') + m['content'] }}
    {%- else %}
        {{- header(m['role']) }}
        {%- if tools and loop.first %}
            {{- 'Functions:\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '\n' }}
        {%- endif %}
        {{- m['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{{- header('assistant') if add_generation_prompt }}"""

_CHATML_TOOLS = r"""
{%- macro listed(tools) %}
    {{- '\n\nFunctions:\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>' }}
{%- endmacro %}
{%- macro called(m, content) %}
    {%- for call in m['tool_calls'] or [] %}
        {{- '\n' if content or not loop.first }}{{ '<tool_call>\n{"name": "' + call['function']['name'] }}
        {{- '", "arguments": ' + call['function']['arguments'] | tojson + '}\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- macro answered(loop, m) %}
    {{- '<|im_start|>user' if not loop.previtem or loop.previtem['role'] != 'tool' }}
    {{- '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}
    {{- '<|im_end|>\n' if loop.last or loop.nextitem['role'] != 'tool' }}
{%- endmacro %}
{%- set named = messages and messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if named else messages %}"""
_CHATML_PROMPT = r"{{- '<|im_start|>assistant\n' if add_generation_prompt }}"

QWEN = _CHATML_TOOLS + r"""
{{- '<|im_start|>system\n' + (messages[0]['content'] if named else 'You are helpful.') }}
{{- listed(tools) if tools }}{{ '<|im_end|>\n' }}
{%- for m in turns %}
    {%- if m['role'] == 'tool' %}
        {{- answered(loop, m) }}
    {%- else %}
        {{- '<|im_start|>' + m['role'] + '\n' + m['content'] + called(m, m['content']) + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}""" + _CHATML_PROMPT

QWEN3 = _CHATML_TOOLS + r"""
{%- if named or tools %}
    {{- '<|im_start|>system\n' }}{{ messages[0]['content'] if named }}{{ listed(tools) if tools }}{{ '<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(query=-1) %}
{%- for m in turns %}
    {%- if m['role'] == 'user' %}{% set last.query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in turns %}
    {%- if m['role'] == 'tool' %}
        {{- answered(loop, m) }}
    {%- elif m['role'] == 'assistant' %}
        {%- set content = m['content'].split('</think>')[-1].lstrip('\n') %}
        {%- set thought = m['reasoning_content'] or '' %}
        {%- if '</think>' in m['content'] %}
            {%- set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.query and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- content + called(m, content) + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}""" + _CHATML_PROMPT

QWEN35 = QWEN3.replace("(loop.last or thought)", "true").replace(
    _CHATML_PROMPT, r"{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}")
"""Each answer after the last question has a thinking block, and the generation prompt opens it."""

R1 = r"""
{{- bos_token }}{{ messages[0]['content'] if messages[0]['role'] == 'system' }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
    {%- if m['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{{- '<｜Assistant｜><think>\n' if add_generation_prompt }}"""
"""The generation prompt opens a thinking block, and no answer has one."""

GEMMA = r"""
{{- bos_token }}
{%- set named = messages[0]['role'] == 'system' %}
{%- for m in (messages[1:] if named else messages) %}
    {%- if m['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}
    {{- messages[0]['content'] + '\n\n' if named and loop.first }}
    {{- m['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""

MISTRAL = r"""
{{- bos_token }}
{%- set named = messages[0]['role'] == 'system' %}
{%- for m in (messages[1:] if named else messages) %}
    {%- if m['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant take turns') }}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' + m['content'] + eos_token }}
    {%- else %}
        {{- '[INST] ' }}{{ messages[0]['content'] + '\n\n' if named and loop.first }}{{ m['content'] + ' [/INST]' }}
    {%- endif %}
{%- endfor %}"""


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of models writes conversations."""

    template: str
    end: str
    """Its end-of-text token, which ends each answer too."""
    begin: str | None = None
    """Token that its tokenizer puts before every text."""
    marks: tuple[str, ...] = ()
    """Further text that is one token each."""


_CHATML_MARKS = ("<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", marks=_CHATML_MARKS),
    "plain": Family(PLAIN, "</s>"),
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "qwen": Family(QWEN, "<|im_end|>", marks=_CHATML_MARKS),
    "qwen3": Family(QWEN3, "<|im_end|>", marks=_CHATML_MARKS),
    "qwen35": Family(QWEN35, "<|im_end|>", marks=_CHATML_MARKS),
    "r1": Family(R1, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>")),
    "gemma": Family(GEMMA, "<end_of_turn>", "<bos>", ("<start_of_turn>",)),
    "mistral": Family(MISTRAL, "</s>", "<s>", ("[INST]", "[/INST]")),
}


def family_tokenizer(folder: str, family: Family) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` with the template, the special tokens and the first token of a family."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = family.template
    tokenizer.add_special_tokens({"eos_token": family.end, **({"bos_token": family.begin} if family.begin else {})})
    tokenizer.add_tokens(list(family.marks), special_tokens=True)
    if family.begin:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.begin} $A", special_tokens=[(family.begin, tokenizer.bos_token_id)])
    return tokenizer


# The same formats without Jinja, from (question, answer) pairs; «what is to be learned» is marked.

Turns = Sequence[tuple[str, str]]


def chatml(turns: Turns, system: str | None) -> str:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return head + "".join(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n«{said}<|im_end|>»\n"
                          for asked, said in turns)


def plain(turns: Turns, system: str | None) -> str:
    head = f"### System:\n{system}\n" if system else ""
    return head + "".join(f"### User:\n{asked}\n### Assistant:\n«{said}</s>»\n" for asked, said in turns)


def llama3(turns: Turns, system: str | None) -> str:
    mark = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    head = f"<|begin_of_text|>{mark('system')}Knowledge ends in May.\n\n{system or ''}<|eot_id|>"
    return head + "".join(f"{mark('user')}{asked}<|eot_id|>{mark('assistant')}«{said}<|eot_id|>»"
                          for asked, said in turns)


def qwen(turns: Turns, system: str | None) -> str:
    return chatml(turns, system or "You are helpful.")


def qwen3(turns: Turns, system: str | None) -> str:
    (asked, said), thought = turns[-1], "<think>\n\n</think>\n\n"
    return chatml([*turns[:-1], (asked, thought + said)], system)


def qwen35(turns: Turns, system: str | None) -> str:
    before, thought, last = qwen3(turns, system).rpartition("«<think>\n")
    return f"{before}{thought[1:]}«{last}"


def r1(turns: Turns, system: str | None) -> str:
    return f"<｜begin▁of▁sentence｜>{system or ''}" + "".join(
        f"<｜User｜>{asked}<｜Assistant｜>«{said}<｜end▁of▁sentence｜>»" for asked, said in turns)


def gemma(turns: Turns, system: str | None) -> str:
    (asked, said), *others = turns
    turns = [(f"{system}\n\n{asked}" if system else asked, said), *others]
    return "<bos>" + "".join(f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n«{said}<end_of_turn>»\n"
                             for asked, said in turns)


def mistral(turns: Turns, system: str | None) -> str:
    (asked, said), *others = turns
    turns = [(f"{system}\n\n{asked}" if system else asked, said), *others]
    return "<s>" + "".join(f"[INST] {asked} [/INST]« {said}</s>»" for asked, said in turns)


WRITTEN = {"chatml": chatml, "plain": plain, "llama3": llama3, "qwen": qwen, "qwen3": qwen3, "qwen35": qwen35, "r1": r1,
           "gemma": gemma, "mistral": mistral}


# A question, a call of a tool, its answer, an answer; and how families write them, the tools listed before.

def call(name: str, **arguments: str) -> dict[str, Any]:
    """One entry of a turn's `tool_calls`."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"name": "find"}, {"name": "call"}]
CALLING = [
    {"role": "user", "content": "Where is p2?"},
    {"role": "assistant", "content": "", "tool_calls": [call("find", what="p2")]},
    {"role": "tool", "content": "floor 2"},
    {"role": "assistant", "content": "On floor 2."},
]
CALLED = {
    "qwen": "<|im_start|>system\nYou are helpful.\n\nFunctions:\n<tools>\n{\"name\": \"find\"}\n{\"name\": \"call\"}\n"
            "</tools><|im_end|>\n<|im_start|>user\nWhere is p2?<|im_end|>\n<|im_start|>assistant\n"
            "«<tool_call>\n{\"name\": \"find\", \"arguments\": {\"what\": \"p2\"}}\n</tool_call><|im_end|>»\n"
            "<|im_start|>user\n<tool_response>\nfloor 2\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n«On floor 2.<|im_end|>»\n",
    "qwen3": "<|im_start|>system\n\n\nFunctions:\n<tools>\n{\"name\": \"find\"}\n{\"name\": \"call\"}\n"
             "</tools><|im_end|>\n<|im_start|>user\nWhere is p2?<|im_end|>\n<|im_start|>assistant\n"
             "«<tool_call>\n{\"name\": \"find\", \"arguments\": {\"what\": \"p2\"}}\n</tool_call><|im_end|>»\n"
             "<|im_start|>user\n<tool_response>\nfloor 2\n</tool_response><|im_end|>\n"
             "<|im_start|>assistant\n«<think>\n\n</think>\n\nOn floor 2.<|im_end|>»\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge ends in May.\n\n<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n{\"name\": \"find\"}\n{\"name\": \"call\"}\n\n"
              "Where is p2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
              "«{\"name\": \"find\", \"parameters\": {\"what\": \"p2\"}}<|eot_id|>»"
              "<|start_header_id|>ipython<|end_header_id|>\n\nfloor 2<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n«On floor 2.<|eot_id|>»",
}

"""Chat templates: the same text as transformers, and no way for a template to run away."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from edgepipe.errors import ConfigError
from edgepipe.runtime.chat import ChatTemplate

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- endif %}
    {%- if message.extra is defined %}{{ message.extra | tojson(indent=1) }}{% endif %}
{%- endfor %}
{{- '<!-- %d of %s -->' % (ns.last_query_index, eos_token) }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% else %}
{{ message['content'] + eos_token }}
    {% endif %}
{% endfor %}"""
TEMPLATES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "  What is <b>2 & 2</b>? 日本 👩‍👩‍👧 "}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>hm</think>\n\nHello!", "tool_calls_none": None},
        {"role": "user", "content": "Bye\n", "extra": {"ü": ["<", 1, True]}},
    ],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
}


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    """Make a transformers tokenizer that only lends its template engine."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_equals_transformers(
    theirs: PreTrainedTokenizerFast, template: str, chat: str, add_generation_prompt: bool
) -> None:
    """Render every family's template as apply_chat_template does, or refuse where it refuses."""
    ours = ChatTemplate(TEMPLATES[template], SPECIAL)
    if template == "mistral" and chat == "system":
        with pytest.raises(ConfigError, match="must alternate"):
            ours.render(CHATS[chat])
        return
    expected = theirs.apply_chat_template(
        CHATS[chat], chat_template=TEMPLATES[template], add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert ours.render(CHATS[chat], add_generation_prompt=add_generation_prompt) == expected
    assert "Hi" in expected or "2 & 2" in expected


def test_date_is_the_machines() -> None:
    """Offer strftime_now."""
    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHATS["question"])
    assert text == time.strftime("%Y")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("nested loops", "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"),
        ("long range", "{% for a in range(10000000) %}x{% endfor %}"),
        ("output", "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}"),
        ("repeat", "{{ 'x' * 10000000000 }}"),
        ("repeated list", "{{ ([0] * 1000000) * 1000000 }}"),
        ("power", "{{ 9 ** 99999999 }}"),
        ("width", "{{ '%1000000000d' % 1 }}"),
        (
            "doubling",
            "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        ),
        ("adding", "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"),
        ("recursion", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"),
        ("bushy recursion", "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}"),
        ("python", "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"),
        ("mutation", "{{ messages.append(1) }}"),
        ("private name", "{% set ns = namespace(_x=1) %}"),
        ("missing", "{{ messages[7].content.text }}"),
        ("division", "{{ 1 / 0 }}"),
    ],
)
def test_templates_that_run_away_are_stopped(name: str, source: str) -> None:
    """Turn endless work, huge values and reaches into Python into one sentence, soon."""
    template = ChatTemplate(source, SPECIAL)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="chat template refused") as caught:
        template.render(CHATS["question"])
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)


def test_budget_begins_anew_for_each_rendering_and_thread() -> None:
    """Render many times and from other threads, though each rendering uses most of the budget."""
    template = ChatTemplate("{% for a in range(30000) %}{% endfor %}{{ messages[0].content }}", {})
    texts: list[str] = []

    def render() -> None:
        texts.extend(template.render([{"role": "user", "content": "x"}]) for _ in range(3))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["x"] * 6


def test_template_that_does_not_compile_is_refused() -> None:
    """Say so when the bundle is opened."""
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for x in %}", {})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        (["hello"], "must be a dict"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": object()}], "text, numbers"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, words: str) -> None:
    """Name what is wrong with a message."""
    with pytest.raises(ConfigError, match=words):
        ChatTemplate(SMOLLM2, SPECIAL).render(messages)

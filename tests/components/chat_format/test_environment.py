from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finemill.components.chat_format.environment import ChatEnvironment, chat_environment
from finemill.components.chat_format.template import ChatTemplate


def slow_environment() -> ImmutableSandboxedEnvironment:
    """Jinja's own ways in the place of the short ones."""

    class Slow(ChatEnvironment):
        getattr = ImmutableSandboxedEnvironment.getattr
        call = ImmutableSandboxedEnvironment.call

    environment, quick = Slow(trim_blocks=True, lstrip_blocks=True), chat_environment(marks_turns=False)
    environment.extensions = quick.extensions
    environment.filters, environment.globals = quick.filters, quick.globals
    environment.extend(marks_turns=False)
    return environment


def shown(environment: ImmutableSandboxedEnvironment, source: str, **variables: Any) -> str:
    try:
        return environment.from_string(source).render(**variables)
    except (TemplateError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ m.content.strip() }}{{ m['content'].upper() }}{{ m.missing }}{{ m.items() | list }}{{ m.keys }}",
        "{% set n = namespace(a=1) %}{% for x in l %}{% set n.a = loop.index0 %}{% endfor %}{{ n.a }}{{ n.c }}",
        "{% set n = namespace(b=false) %}{{ n.b }}",
        "{% for x in l %}{{ loop.first }}{{ loop.previtem }}{{ loop.cycle('a', 'b') }}{{ loop.depth }}{% endfor %}",
        "{{ m.content.__class__ }}",
        "{{ m.__class__ }}{{ m.__init__ }}",
        "{{ '{0.__class__}'.format(m) }}",
        "{{ '{a.__class__}'.format_map({'a': m}) }}",
        "{{ m.update({'a': 1}) }}",
        "{{ l.append(1) }}",
        "{{ m.content.split('a')[0].join(['x', 'y']) }}{{ 'a'.encode() }}",
        "{{ m.content() }}",
        "{% set n = namespace() %}{{ n.__class__ }}{{ n._Namespace__attrs }}",
        "{{ m.content.missing }}{{ none.a }}{{ 5.real }}{{ raise_exception('no') }}",
    ],
)
def test_the_short_ways_give_what_the_long_ones_give(source: str) -> None:
    variables = {"m": {"role": "user", "content": " abc "}, "l": [1, 2, 3]}
    assert shown(chat_environment(marks_turns=False), source, **variables) == shown(
        slow_environment(), source, **variables
    )


def test_published_templates_render_as_in_jinjas_own_sandbox(
    published_templates: dict[str, ChatTemplate], conversations: dict[str, tuple[list[dict[str, Any]], Any]]
) -> None:
    quick, slow = chat_environment(marks_turns=False), slow_environment()
    for name in ("qwen3", "llama3_1", "gemma3", "gptoss", "phi3", "deepseekv3", "glm4moe", "qwen3_6"):
        template = published_templates[name]
        for messages, tools in conversations.values():
            variables = {"messages": template.prepare(messages), "tools": tools, "add_generation_prompt": True}
            assert shown(quick, template.source, **variables) == shown(slow, template.source, **variables)

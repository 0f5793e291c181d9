from contextlib import suppress
from typing import Any

import jinja2
import pytest

from finemill.components.chat_format.environment import chat_environment
from finemill.components.chat_format.skeleton import notes_texts
from finemill.components.chat_format.template import ChatTemplate
from finemill.rows.reasons import DroppedRowError
from tests.components.chat_format.conftest import Message, assistant, user

PRINTS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
# What a template may do with a text, and a text to which it does something.
LOOKS = {
    "holds": ("{{ 'held' if '#' in m.content else m.content }}", "a # b"),
    "starts": ("{{ m.content if m.content.startswith('#') else 'x' + m.content }}", "#a"),
    "ends": ("{{ m.content if m.content.endswith('#') else m.content + 'x' }}", "a#"),
    "trims": ("{{ m.content | trim }}", " a\n"),
    "strips": ("{{ m.content.strip('#') }}", "#a#"),
    "splits": ("{{ m.content.split('#')[-1] }}", "a#b"),
    "empty": ("{{ m.content if m.content else 'nothing' }}", ""),
    "equals": ("{{ 'same' if m.content == 'a' else m.content }}", "a"),
    "counts": ("{{ m.content | length }}{{ m.content }}", "four"),
    "slices": ("{{ m.content[:2] }}{{ m.content }}", "abc"),
    "letters": ("{% for c in m.content %}{{ c }}.{% endfor %}", "abc"),
    "quotes": ("{{ m.content | tojson }}{{ m.content }}", 'a "b"'),
    "strips joined": ("{% set c = 'x' + m.content %}{{ c.strip('#') }}", "a#"),
    "compares": ("{{ m.content if m.content < 'b' else 'later' }}", "c"),
    "held": ("{{ m.content if m.content in 'abc' else 'not in ' + m.content }}", "b"),
    "capitals": ("{{ m.content.upper() }}{{ m.content }}", "abc"),
    "blocks": ("{% set c %}{{ m.content }}{% endset %}{{ c | trim }}", " a "),
}


def check(template: ChatTemplate, messages: list[Message], kwargs: dict[str, Any]) -> bool:
    """Compare what a skeleton gives with what the template does, learn it. Returns: whether there is a skeleton."""
    known = template.render_from_skeleton(messages, None, kwargs)
    plain = template.render_marked(messages, None, kwargs), template.render(messages[:-1], None, kwargs, prompt=True)
    assert known in (None, plain)
    template.learn_skeleton(messages, None, kwargs, plain)
    return known is not None


@pytest.mark.parametrize("look", LOOKS)
def test_a_text_is_written_as_the_template_writes_it_after_any_other(look: str) -> None:
    source = PRINTS.replace("{{ m.content }}", LOOKS[look][0])
    texts = ("plain", LOOKS[look][1], "another")
    for first in texts:
        template = ChatTemplate(source, {}, "test")
        for text in (first, *texts):
            check(template, [user(text), assistant("yes")], {})


def test_published_templates_write_conversations_of_a_known_form_as_each_alone(
    published_templates: dict[str, ChatTemplate], random_conversations: list[list[Message]]
) -> None:
    from_skeletons = 0
    for template in published_templates.values():
        for messages in random_conversations[:60]:
            with suppress(DroppedRowError):
                from_skeletons += check(template, template.prepare(messages), {})
    assert from_skeletons > 100


def test_other_variables_of_the_template_are_another_form() -> None:
    template = ChatTemplate("{{ word }}" + PRINTS, {}, "test")
    messages = [user("a"), assistant("b")]
    assert [check(template, messages, {"word": word}) for word in ("one", "two", "one")] == [False, False, True]
    assert [check(template, messages, {"word": ["three"]}) for _ in range(2)] == [False, False]


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        (PRINTS, True),
        ("{{ messages[0]['content'] | trim + eos_token }}", True),
        ("{% set x %}{{ messages[0].content }}{% endset %}{{ x[1:] }}", False),
        ("{{ messages[0].content | upper }}", False),
        ("{{ 'a' ~ messages[0].content }}", False),
        ("{{ '%s' % messages[0].content }}", False),
        ("{{ ', '.join([messages[0].content]) }}", False),
        ("{{ messages[0].content in 'abc' }}", False),
    ],
)
def test_a_template_that_could_change_a_text_unseen_has_no_skeletons(source: str, noted: bool) -> None:
    environment: jinja2.Environment = chat_environment(marks_turns=True)
    assert notes_texts(environment.parse(source)) is noted

"""Conversations of one form rendered once: a template's text with gaps, filled with what the messages say.

Two conversations whose messages have the same roles and keys differ in their texts only, and most templates print those
as they are. So a form is rendered once with recorded texts in place of the real ones. They note whatever the template
asks about them ("does it hold </think>?", "is it the same without the line breaks around it?"), and each real text is
asked the same: where an answer differs, the conversation is rendered as usual. A template that does with texts what
cannot be noted has no skeletons.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NoReturn

from jinja2 import nodes

from finemill.artifacts.messages import Message
from finemill.rows.reasons import DroppedRowError

GAP = "\ufdd3"
"""Stands around a gap; no text of a row holds it."""
# JSON, HTML, capitals and slices would change it, which is seen.
_WORD = 'Gap"of text'
_GAP = re.compile(f"{GAP}{_WORD}(\\d+){GAP}")
_MOST_FORMS = 2000

_FILTERS = ("count", "d", "default", "first", "last", "length", "list", "string", "tojson", "trim")
_TESTS = (
    *("boolean", "defined", "eq", "equalto", "even", "false", "iterable", "mapping", "none", "number", "odd", "string"),
    *("true", "undefined"),
)
_METHODS = ("endswith", "get", "items", "keys", "lstrip", "rstrip", "split", "startswith", "strip")
_FUNCTIONS = ("namespace", "raise_exception", "range", "strftime_now")
# What makes plain text of recorded texts, of which nothing is noted any more.
_PLAIN_TEXT = (nodes.AssignBlock, nodes.CallBlock, nodes.Concat, nodes.FilterBlock, nodes.Include, nodes.Macro)

_DIFFERS: Mapping[str, Callable[[str, Any], bool]] = {
    "empty": lambda text, _: not text,
    "equals": lambda text, about: text == about,
    "holds": lambda text, about: about in text,
    "startswith": lambda text, about: text.startswith(about),
    "endswith": lambda text, about: text.endswith(about),
    "strip": lambda text, about: text.strip(about) != text,
    "lstrip": lambda text, about: text.lstrip(about) != text,
    "rstrip": lambda text, about: text.rstrip(about) != text,
}
"""Whether a text answers a question otherwise than a recorded one did."""


class _NotNotedError(Exception):
    """The template does with a text what cannot be noted."""


def _refuse(*_: object, **__: object) -> NoReturn:
    raise _NotNotedError


class _Joined(str):
    """A text with recorded ones in it, which can be joined and printed."""

    def __add__(self, other: str) -> "_Joined":
        return _Joined(str.__str__(self) + (str(other) if isinstance(other, _Joined) else other))

    def __radd__(self, other: str) -> "_Joined":
        return _Joined(other + str.__str__(self))

    def __str__(self) -> str:
        return str.__str__(self)


for _name in set(vars(str)) - {"__add__", "__doc__", "__getattribute__", "__new__", "__str__"}:
    setattr(_Joined, _name, _refuse)


class _Recorded(_Joined):
    """A text of a message, which notes what it is asked: its number, the question, and about what."""

    number: int
    notes: set[tuple[int, str, Any]]

    @classmethod
    def of(cls, number: int, notes: set[tuple[int, str, Any]]) -> "_Recorded":
        """A text with this number that puts what it is asked into `notes`."""
        text = cls(f"{GAP}{_WORD}{number}{GAP}")
        text.number, text.notes = number, notes
        return text

    def _note(self, question: str, about: object) -> None:
        if not isinstance(about, str | None) or isinstance(about, _Joined):
            raise _NotNotedError
        self.notes.add((self.number, question, about))

    def __bool__(self) -> bool:
        self._note("empty", None)
        return True

    def __eq__(self, other: object) -> bool:
        self._note("equals", other)
        return False

    def __ne__(self, other: object) -> bool:
        self._note("equals", other)
        return True

    __hash__ = _refuse

    def __contains__(self, other: object) -> bool:
        self._note("holds", other)
        return False

    def startswith(self, prefix: object) -> bool:  # type: ignore[override]
        self._note("startswith", prefix)
        return False

    def endswith(self, suffix: object) -> bool:  # type: ignore[override]
        self._note("endswith", suffix)
        return False

    def split(self, separator: object) -> "list[_Recorded]":  # type: ignore[override]
        self._note("holds", separator)
        return [self]

    def strip(self, characters: object = None) -> "_Recorded":
        self._note("strip", characters)
        return self

    def lstrip(self, characters: object = None) -> "_Recorded":
        self._note("lstrip", characters)
        return self

    def rstrip(self, characters: object = None) -> "_Recorded":
        self._note("rstrip", characters)
        return self


@dataclass(frozen=True)
class _Skeleton:
    """A marked text and a prompt, each as pieces with numbers of texts between them, and what the texts are asked."""

    marked: list[str]
    prompt: list[str]
    questions: list[tuple[int, Callable[[str, Any], bool], Any]]

    def fill(self, texts: list[str]) -> tuple[str, str] | None:
        """Marked text and prompt with these texts, None if one of them would be written otherwise."""
        for number, differs, about in self.questions:
            if differs(texts[number], about):
                return None
        return _filled(self.marked, texts), _filled(self.prompt, texts)


def _filled(pieces: list[str], texts: list[str]) -> str:
    filled = pieces.copy()
    filled[1::2] = [texts[int(number)] for number in pieces[1::2]]
    return "".join(filled)


Render = Callable[[list[Message]], tuple[str, str]]
"""Renders a conversation: its marked text, and the prompt before its last message."""


class Skeletons:
    """The skeletons of one template by form."""

    def __init__(self) -> None:
        self._known: dict[Any, _Skeleton | None] = {}

    def fill(self, messages: list[Message], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
        """Marked text and prompt of a conversation, None where it must be rendered."""
        form, texts = _form_of(messages, kwargs)
        skeleton = self._known.get(form)
        return None if skeleton is None else skeleton.fill(texts)

    def learn(
        self, messages: list[Message], kwargs: Mapping[str, Any], rendered: tuple[str, str], render: Render
    ) -> None:
        """Make the skeleton of a conversation's form, once.

        Args:
            messages: the conversation.
            kwargs: further variables of the template.
            rendered: its marked text and prompt, to check the skeleton.
            render: renders another conversation with the same variables.
        """
        form, texts = _form_of(messages, kwargs)
        if form is None or form in self._known or len(self._known) >= _MOST_FORMS:
            return
        skeleton = _record(messages, render)
        wrong = skeleton is not None and skeleton.fill(texts) not in (None, rendered)
        self._known[form] = None if wrong else skeleton


def _form_of(messages: list[Message], kwargs: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """All that a template gets of a conversation without tools but its texts, and these; None for one with more."""
    parts: list[Any] = [*kwargs.items()]
    texts: list[str] = []
    for message in messages:
        parts.append(tuple(message))
        for key, value in message.items():
            if type(value) is str and key != "role":
                texts.append(value)
            else:
                parts.append(value)
    try:
        hash(form := tuple(parts))
    except TypeError:
        return None, []
    return form, texts


def _record(messages: list[Message], render: Render) -> _Skeleton | None:
    """The skeleton of a conversation's form, None where the template does what cannot be noted."""
    notes: set[tuple[int, str, Any]] = set()
    numbers = count()
    recorded = [
        {
            key: _Recorded.of(next(numbers), notes) if type(value) is str and key != "role" else value
            for key, value in message.items()
        }
        for message in messages
    ]
    try:
        marked, prompt = (_GAP.split(text) for text in render(recorded))
    except (_NotNotedError, DroppedRowError):
        return None
    if any(GAP in piece or _WORD.casefold() in piece.casefold() for piece in (*marked[::2], *prompt[::2])):
        return None
    questions = [(number, _DIFFERS[question], about) for number, question, about in sorted(notes, key=repr)]
    return _Skeleton(marked, prompt, questions)


def notes_texts(tree: nodes.Template) -> bool:
    """Whether all that a template may do with texts is noted, or seen in what comes out."""
    named: tuple[tuple[type[nodes.Expr], Callable[[Any], bool]], ...] = (
        (nodes.Filter, lambda node: node.name in _FILTERS),
        (nodes.Test, lambda node: node.name in _TESTS),
        (nodes.Call, _is_noted_call),
        (nodes.Mod, lambda node: isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)),
        (nodes.Compare, lambda node: all(_is_noted_operand(node, operand) for operand in node.ops)),
    )
    if next(tree.find_all(_PLAIN_TEXT), None) is not None:
        return False
    return all(is_noted(node) for kind, is_noted in named for node in tree.find_all(kind))


def _is_noted_call(call: nodes.Call) -> bool:
    if isinstance(call.node, nodes.Getattr):
        return call.node.attr in _METHODS
    return isinstance(call.node, nodes.Name) and call.node.name in _FUNCTIONS


def _is_noted_operand(compare: nodes.Compare, operand: nodes.Operand) -> bool:
    """Only what a text holds is noted, not what holds it."""
    left = compare.expr
    is_role = isinstance(left, nodes.Getattr) and left.attr == "role"
    is_role |= isinstance(left, nodes.Getitem) and isinstance(left.arg, nodes.Const) and left.arg.value == "role"
    return operand.op in ("eq", "ne") or (operand.op not in ("in", "notin")) or is_role or isinstance(left, nodes.Const)

"""Pretraining text: statements, arithmetic facts, textbook exercises and plain chats, generated from a seed.

The text teaches a small model language, arithmetic and how worked exercises read in a textbook. It holds no row of
the example data: the exercises are worded differently and are never asked in a chat, where questions of one step are
answered at once. Answering a problem of several steps in a chat is what tuning adds.
"""

import json
from collections.abc import Callable
from random import Random

from finemill.models.base.exercises import EXERCISES
from finemill.rows.examples.words import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    DAYS,
    HOBBIES,
    ITEMS,
    KINDS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PLACES,
)

Fact = tuple[int, str, int, int]


def arithmetic_fact(rng: Random) -> Fact:
    """(a, operator, b, result), whole numbers from 0 to 200; products and what is divided go up to 240."""
    operator = rng.choice("++--**/")
    if operator == "+":
        result = rng.randint(0, 200)
        a = rng.randint(0, result)
        return a, "+", result - a, result
    if operator == "-":
        a = rng.randint(0, 200)
        b = rng.randint(0, a)
        return a, "-", b, a - b
    small = rng.randint(1, 12)
    large = rng.randint(1, 200 // small if small < 4 else 20)
    if operator == "/":
        return small * large, "/", small, large
    a, b = rng.sample((small, large), 2)
    return a, "*", b, small * large


def _equation(fact: Fact) -> str:
    a, operator, b, result = fact
    return f"{a} {operator} {b} = {result}"


def equations(rng: Random) -> str:
    """A few equations in a row."""
    separator = rng.choice(("\n", ", ", "; ", ". "))
    return separator.join(_equation(arithmetic_fact(rng)) for _ in range(rng.randint(2, 8)))


def spoken_facts(rng: Random) -> str:
    """Arithmetic facts as sentences."""
    return " ".join(_spoken(arithmetic_fact(rng), rng) for _ in range(rng.randint(1, 4)))


def _spoken(fact: Fact, rng: Random) -> str:
    a, operator, b, result = fact
    forms = {
        "+": (
            f"{a} plus {b} is {result}.",
            f"The sum of {a} and {b} is {result}.",
            f"Adding {b} to {a} gives {result}.",
        ),
        "-": (f"{a} minus {b} is {result}.", f"{a} less {b} leaves {result}.", f"Taking {b} from {a} leaves {result}."),
        "*": (f"{a} times {b} is {result}.", f"The product of {a} and {b} is {result}."),
        "/": (f"{a} divided by {b} is {result}.", f"{a} split into {b} equal parts gives {result} each."),
    }
    return rng.choice(forms[operator])


def number_line(rng: Random) -> str:
    """Counting, comparing, doubling."""
    a, b = rng.sample(range(1, 200), 2)
    step = rng.randint(1, 9)
    return rng.choice(
        (
            "Counting: " + " ".join(str(a + step * i) for i in range(6)),
            f"{max(a, b)} is greater than {min(a, b)}.",
            f"{min(a, b)} is smaller than {max(a, b)}.",
            f"Twice {a // 2} is {a // 2 * 2}. Half of {a // 2 * 2} is {a // 2}.",
        )
    )


def world_statement(rng: Random) -> str:
    """Sentences about animals, colors, places and words."""
    return " ".join(rng.choice(_STATEMENTS)(rng) for _ in range(rng.randint(1, 4)))


def _animal_statement(rng: Random) -> str:
    name = rng.choice(list(ANIMALS))
    home, sound = ANIMALS[name]
    return rng.choice((f"The {name} lives in a {home}.", f"A {name} {sound}.", f"In the {home} there is a {name}."))


def _color_statement(rng: Random) -> str:
    thing, shade = rng.choice(list(COLORS.items()))
    return rng.choice((f"The color of {thing} is {shade}.", f"{thing.capitalize()} is {shade}."))


def _word_statement(rng: Random) -> str:
    word, other = rng.choice(list(OPPOSITES.items()))
    return rng.choice((f"The opposite of {word} is {other}.", f"{word.capitalize()} means not {other}."))


def _capital_statement(rng: Random) -> str:
    country, city = rng.choice(list(CAPITALS.items()))
    return rng.choice((f"The capital of {country} is {city}.", f"{city} is a city in {country}."))


def _calendar_statement(rng: Random) -> str:
    cycle = rng.choice((DAYS, MONTHS))
    index = rng.randrange(len(cycle))
    return f"{cycle[(index + 1) % len(cycle)]} comes after {cycle[index]}."


def _kind_statement(rng: Random) -> str:
    kind = rng.choice(list(KINDS))
    first, second, third = rng.sample(KINDS[kind], 3)
    return rng.choice((f"{first.capitalize()} and {second} are {kind}.", f"Some {kind}: {first}, {second}, {third}."))


def _person_statement(rng: Random) -> str:
    name, other = rng.sample(NAMES, 2)
    city, hobby, place = rng.choice(CITIES), rng.choice(HOBBIES), rng.choice(PLACES)
    items = rng.choice(list(ITEMS.values()))
    return rng.choice(
        (
            f"{name} lives in {city} and likes {hobby}.",
            f"On {rng.choice(DAYS)} {name} and {other} go to the {place}.",
            f"{name} brings {other} some {items} from the {place}.",
            f"{name} is a friend of {other}. They both enjoy {hobby}.",
        )
    )


_STATEMENTS: tuple[Callable[[Random], str], ...] = (
    _animal_statement,
    _color_statement,
    _word_statement,
    _capital_statement,
    _calendar_statement,
    _kind_statement,
    _person_statement,
)


def record(rng: Random) -> str:
    """Small pieces of markup: JSON, a table, a list, a formula, a function call."""
    name, city, hobby = rng.choice(NAMES), rng.choice(CITIES), rng.choice(HOBBIES)
    singular, items = rng.choice(list(ITEMS.items()))
    a, operator, b, result = arithmetic_fact(rng)
    person = {"name": name, "city": city, "likes": [hobby, items], "age": a}
    call = {"name": f"count_{items}", "arguments": {"person": name, "limit": b}}
    return rng.choice(
        (
            json.dumps(person),
            f"<tool_call>\n{json.dumps(call)}\n</tool_call>",
            f"| name | {items} |\n| --- | --- |\n| {name} | {a} |\n| {rng.choice(NAMES)} | {b} |",
            f"# {items.capitalize()}\n\n- one {singular}\n- {a} {items}\n- *{city}*, `{hobby}`",
            f"$${a} {operator} {b} = \\boxed{{{result}}}$$",
            f"def {hobby}({singular}=[{a}, {b}]):\n    return {singular}[0] {operator} {singular}[1]  # {result}",
        )
    )


def exercise(rng: Random) -> str:
    """One or two textbook exercises, each a text followed by its working and result."""
    return "\n\n".join(_worked(rng) for _ in range(rng.randint(1, 2)))


def _worked(rng: Random) -> str:
    text, steps, result = rng.choice(EXERCISES)(rng)
    lines = "\n".join(steps)
    boxed = f"\\boxed{{{result}}}"
    return rng.choice(
        (
            f"Exercise: {text}\nWorking: {', '.join(steps)}\nResult: {result}",
            f"{text}\n{lines}\nAnswer: {result}",
            f"Example. {text} We write {' and '.join(steps)}, so the result is {result}.",
            f"{text} Solution: {'; '.join(steps)}. That makes {boxed}.",
            f"Problem: {text}\n\n<think>\n{lines}\n</think>\n\nThe result is {boxed}.",
            f"{text}\n<think>\n{lines}\n</think>\n\nResult: {boxed}",
        )
    )


def chat(rng: Random) -> str:
    """A chat in the template's form about facts and small sums, answered at once."""
    parts = []
    if rng.random() < 0.2:
        parts.append("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    turns = rng.randint(1, 3)
    for turn in range(turns):
        question, answer, thought = _exchange(rng)
        # As in Qwen3's template: thoughts of earlier turns are dropped, the last one is kept and may be empty.
        thinking = f"<think>\n{thought if rng.random() < 0.5 else ''}\n</think>\n\n" if turn == turns - 1 else ""
        parts.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{thinking}{answer}<|im_end|>\n")
    return "".join(parts)


def _exchange(rng: Random) -> tuple[str, str, str]:
    """A question, its answer and a thought about the question."""
    draw = rng.random()
    if draw < 0.35:
        a, operator, b, result = arithmetic_fact(rng)
        verb = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[operator]
        question = rng.choice((f"What is {a} {operator} {b}?", f"How much is {a} {verb} {b}?", f"{a} {verb} {b}?"))
        return question, rng.choice((f"It is {result}.", f"{a} {verb} {b} is {result}.")), "The user asks for a number."
    if draw < 0.6:
        return _counting_exchange(rng)
    if draw < 0.7:
        name = rng.choice(NAMES)
        return f"{rng.choice(('Hello', 'Hi'))}, I am {name}.", f"Nice to meet you, {name}.", f"This is {name}."
    country, city = rng.choice(list(CAPITALS.items()))
    thing, shade = rng.choice(list(COLORS.items()))
    word, other = rng.choice(list(OPPOSITES.items()))
    name = rng.choice(list(ANIMALS))
    kind = rng.choice(list(KINDS))
    day = rng.randrange(len(DAYS))
    return rng.choice(
        (
            (f"What is the capital of {country}?", f"{city}.", "The user asks about a country."),
            (f"What color is {thing}?", f"It is {shade}.", "The user asks about a color."),
            (f"What is the opposite of {word}?", f"{other.capitalize()}.", "The user asks about a word."),
            (f"Where does a {name} live?", f"It lives in a {ANIMALS[name][0]}.", "The user asks about an animal."),
            (f"Name one of the {kind}.", f"{rng.choice(KINDS[kind]).capitalize()}.", "The user wants a word."),
            (f"What day comes after {DAYS[day - 1]}?", f"{DAYS[day]}.", "The user asks about a day."),
        )
    )


def _counting_exchange(rng: Random) -> tuple[str, str, str]:
    """A word problem of a single step."""
    a, operator, b, result = arithmetic_fact(rng)
    name, items = rng.choice(NAMES), rng.choice(list(ITEMS.values()))
    question = {
        "+": f"{name} has {a} {items} and gets {b} more. How many is that?",
        "-": f"{name} has {a} {items} and loses {b}. How many are left?",
        "*": f"{name} has {a} bags of {b} {items}. How many {items} is that?",
        "/": f"{name} puts {a} {items} into {b} equal rows. How many are in a row?",
    }[operator]
    return question, rng.choice((f"{result} {items}.", f"{name} has {result}.", f"{result}.")), f"{name} has {items}."


# Each kind of document with its share of the corpus.
_DOCUMENTS: dict[Callable[[Random], str], float] = {
    equations: 0.18,
    spoken_facts: 0.12,
    number_line: 0.04,
    world_statement: 0.12,
    record: 0.04,
    exercise: 0.32,
    chat: 0.18,
}


def document(rng: Random) -> str:
    """One document of a kind drawn by the shares above."""
    (kind,) = rng.choices(list(_DOCUMENTS), weights=list(_DOCUMENTS.values()))
    return kind(rng)

"""Preferences in TRL's columns: a question, a true whole sentence, and a bare word or a false sentence instead."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from finemill.rows.examples.words import ANIMALS, CAPITALS, COLORS, DAYS, ITEMS, NAMES, OPPOSITES


@dataclass(frozen=True)
class Question:
    """A question, its answer in a word, and the sentence that gives an answer, with `{}` in its place."""

    text: str
    answer: str
    sentence: str
    wrong: str
    """Another answer of the same kind."""


def _pick(rng: Random, answers: dict[str, str]) -> tuple[str, str, str]:
    """A key, its answer, and another one."""
    key, answer = rng.choice(list(answers.items()))
    return key, answer, rng.choice(sorted(set(answers.values()) - {answer}))


def capital(rng: Random) -> Question:
    """The capital of a country."""
    country, city, other = _pick(rng, CAPITALS)
    return Question(f"What is the capital of {country}?", city, f"The capital of {country} is {{}}.", other)


def color(rng: Random) -> Question:
    """The usual color of a thing."""
    thing, shade, other = _pick(rng, COLORS)
    return Question(f"What color is {thing}?", shade, f"The color of {thing} is {{}}.", other)


def opposite(rng: Random) -> Question:
    """The opposite of a word."""
    word, answer, other = _pick(rng, OPPOSITES)
    return Question(f"What is the opposite of {word}?", answer, f"The opposite of {word} is {{}}.", other)


def home(rng: Random) -> Question:
    """Where an animal lives."""
    name, place, other = _pick(rng, {animal: place for animal, (place, _) in ANIMALS.items()})
    return Question(f"Where does a {name} live?", f"in a {place}", f"The {name} lives {{}}.", f"in a {other}")


def calendar(rng: Random) -> Question:
    """The day that follows another."""
    before, day, other = _pick(rng, dict(zip(DAYS, (*DAYS[1:], DAYS[0]), strict=True)))
    return Question(f"What day comes after {before}?", day, f"{{}} comes after {before}.", other)


def arithmetic(rng: Random) -> Question:
    """A sum or a difference up to 200."""
    total = rng.randint(10, 200)
    a = rng.randint(1, total - 1)
    sign, verb, first, second, result = rng.choice(
        (("+", "plus", a, total - a, total), ("-", "minus", total, a, total - a))
    )
    wrong = result + rng.choice((-1, 1)) * rng.randint(1, 9)
    return Question(
        f"What is {first} {sign} {second}?", f"{result}", f"{first} {verb} {second} is {{}}.", f"{abs(wrong)}"
    )


def counting(rng: Random) -> Question:
    """A word problem of one step."""
    name, items = rng.choice(NAMES), rng.choice(list(ITEMS.values()))
    total = rng.randint(10, 200)
    a = rng.randint(1, total - 1)
    text, result = rng.choice(
        (
            (f"{name} has {a} {items} and gets {total - a} more. How many is that?", total),
            (f"{name} has {total} {items} and loses {a}. How many are left?", total - a),
        )
    )
    wrong = result + rng.choice((-1, 1)) * rng.randint(1, 9)
    return Question(text, f"{result}", f"{name} has {{}} {items}.", f"{abs(wrong)}")


TOPICS: tuple[Callable[[Random], Question], ...] = (capital, color, opposite, home, calendar, arithmetic, counting)


def preference_row(rng: Random) -> dict[str, str]:
    """One preference; the worse answer is a bare word in half of the rows, a false sentence in the others.

    Most questions follow a greeting: there are few facts, and a prompt that repeats counts only once.
    """
    question = rng.choice(TOPICS)(rng)
    greeting = f"{rng.choice(('Hello', 'Hi'))}, I am {rng.choice(NAMES)}. " if rng.random() < 0.8 else ""
    chosen = _sentence(question.sentence.format(question.answer))
    rejected = question.sentence.format(question.wrong) if rng.random() < 0.5 else f"{question.answer}."
    return {"prompt": f"{greeting}{question.text}", "chosen": chosen, "rejected": _sentence(rejected)}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]

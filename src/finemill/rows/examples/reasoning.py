"""Reasoning problems with short worked solutions, in OpenMathReasoning's columns.

A problem family draws its numbers so that every intermediate result is a whole number between 0 and 200: what is
asked of a model is to choose the right steps, in the right order, on the right numbers.
"""

from collections.abc import Callable
from random import Random

from finemill.rows.examples.long_reasoning import LONG_FAMILIES
from finemill.rows.examples.problem import Problem, product, rest, total
from finemill.rows.examples.words import CONTAINERS, FIELDS, GROUPS, ITEMS, NAMES, PLACES


def gain_and_loss(rng: Random) -> Problem:
    """(a + b) - c."""
    name, items = rng.choice(NAMES), rng.choice(list(ITEMS.values()))
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    c = rng.randint(5, a + b - 5)
    question = rng.choice(
        (
            f"{name} has {a} {items}, buys {b} more and gives away {c}. How many {items} does {name} have now?",
            f"{name} finds {b} {items} and already had {a}. Then {c} of them are lost. How many {items} are left?",
            f"There were {a} {items} in {name}'s shop. {b} were delivered and {c} were sold. How many {items} remain?",
        )
    )
    return Problem(question, (f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"), a + b - c, items)


def shopping_total(rng: Random) -> Problem:
    """(a * p) + (b * q)."""
    (one, many), (other, others) = rng.sample(list(ITEMS.items()), 2)
    a, b, p, q = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 12)
    question = rng.choice(
        (
            f"One {one} costs {p} dollars and one {other} costs {q} dollars. What do {a} {many} and {b} {others} cost?",
            (
                f"{rng.choice(NAMES)} buys {a} {many} at {p} dollars each and {b} {others} at {q} dollars each. "
                "What is the total price?"
            ),
        )
    )
    steps = (f"{a} * {p} = {a * p}", f"{b} * {q} = {b * q}", f"{a * p} + {b * q} = {a * p + b * q}")
    return Problem(question, steps, a * p + b * q, "dollars")


def packed_and_loose(rng: Random) -> Problem:
    """(a * b) + c."""
    items = rng.choice(list(ITEMS.values()))
    container, containers = rng.choice(list(CONTAINERS.items()))
    a, b, c = rng.randint(2, 12), rng.randint(3, 12), rng.randint(5, 50)
    question = rng.choice(
        (
            f"There are {a} {containers} with {b} {items} each, and {c} loose {items}. How many {items} are there?",
            (
                f"{rng.choice(NAMES)} fills {a} {containers}. Each {container} holds {b} {items}, and {c} {items} "
                f"do not fit. How many {items} are there in all?"
            ),
        )
    )
    return Problem(question, (f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"), a * b + c, items)


def equal_shares(rng: Random) -> Problem:
    """(a + b) / c."""
    first, second = rng.sample(NAMES, 2)
    items, people = rng.choice(list(ITEMS.values())), rng.choice(GROUPS)
    c, share = rng.randint(3, 12), rng.randint(4, 12)
    a = rng.randint(3, c * share - 3)
    b = c * share - a
    question = rng.choice(
        (
            (
                f"{first} brings {a} {items} and {second} brings {b}. They share all of them equally among {c} "
                f"{people}. How many {items} does each one get?"
            ),
            f"{c} {people} split {a} red and {b} blue {items} evenly. How many {items} does each one receive?",
        )
    )
    return Problem(question, (f"{a} + {b} = {a + b}", f"{a + b} / {c} = {share}"), share, items)


def money_back(rng: Random) -> Problem:
    """d - (a * p)."""
    name = rng.choice(NAMES)
    one, many = rng.choice(list(ITEMS.items()))
    a, p = rng.randint(2, 12), rng.randint(3, 12)
    d = rng.randint(a * p + 1, 199)
    question = rng.choice(
        (
            f"{name} pays for {a} {many} at {p} dollars each with {d} dollars. How much money comes back?",
            (
                f"With {d} dollars in hand, {name} buys {a} {many}. Each {one} costs {p} dollars. "
                "How many dollars are left?"
            ),
        )
    )
    return Problem(question, (f"{a} * {p} = {a * p}", f"{d} - {a * p} = {d - a * p}"), d - a * p, "dollars")


def ages(rng: Random) -> Problem:
    """((a + b) * c) - d."""
    first, second, third = rng.sample(NAMES, 3)
    a, b, c = rng.randint(3, 20), rng.randint(2, 15), rng.choice((2, 3))
    d = rng.randint(1, 9)
    middle, oldest = a + b, (a + b) * c
    question = (
        f"{first} is {a} years old. {second} is {b} years older than {first}. {third} is {c} times as old as {second}. "
        f"How old was {third} {d} years ago?"
    )
    steps = (f"{a} + {b} = {middle}", f"{middle} * {c} = {oldest}", f"{oldest} - {d} = {oldest - d}")
    return Problem(question, steps, oldest - d, "years")


def journey(rng: Random) -> Problem:
    """(v * h) + w, or the way that is left."""
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    v, h, w = rng.randint(3, 12), rng.randint(2, 9), rng.randint(5, 60)
    if rng.random() < 0.5:
        question = (
            f"{name} rides {v} km an hour for {h} hours and then walks {w} km to the {place}. How many km is the way?"
        )
        return Problem(question, (f"{v} * {h} = {v * h}", f"{v * h} + {w} = {v * h + w}"), v * h + w, "km")
    total = v * h + w
    question = (
        f"The {place} is {total} km away. {name} travels {v} km an hour for {h} hours. How many km are still to go?"
    )
    return Problem(question, (f"{v} * {h} = {v * h}", f"{total} - {v * h} = {w}"), w, "km")


def rectangle(rng: Random) -> Problem:
    """(a + b) * 2, or the missing side."""
    place = rng.choice(FIELDS)
    a, b = rng.randint(3, 50), rng.randint(3, 45)
    if rng.random() < 0.6:
        question = f"A {place} is {a} meters long and {b} meters wide. What is its perimeter?"
        return Problem(question, (f"{a} + {b} = {a + b}", f"{a + b} * 2 = {2 * (a + b)}"), 2 * (a + b), "meters")
    around = 2 * (a + b)
    question = f"The perimeter of a {place} is {around} meters. It is {a} meters long. How wide is it?"
    return Problem(question, (f"{around} / 2 = {a + b}", f"{a + b} - {a} = {b}"), b, "meters")


def linear_equation(rng: Random) -> Problem:
    """(c - b) / a."""
    a, x, b = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 50)
    letter = rng.choice("xyzn")
    c = a * x + b
    question = rng.choice(
        (
            f"Solve {a} * {letter} + {b} = {c} for {letter}.",
            f"If {a} times {letter} plus {b} is {c}, what is {letter}?",
        )
    )
    return Problem(question, (f"{c} - {b} = {c - b}", f"{c - b} / {a} = {x}"), x)


def expression(rng: Random) -> Problem:
    """a * (b + c) - d."""
    a, b, c = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 8)
    product = a * (b + c)
    d = rng.randint(1, product - 1)
    verb = rng.choice(("Compute", "Evaluate", "Work out"))
    steps = (f"{b} + {c} = {b + c}", f"{a} * {b + c} = {product}", f"{product} - {d} = {product - d}")
    return Problem(f"{verb} {a} * ({b} + {c}) - {d}.", steps, product - d)


def average(rng: Random) -> Problem:
    """(a + b + c) / 3."""
    mean = rng.randint(14, 40)
    a, b = rng.randint(2, mean + 6), rng.randint(2, mean + 6)
    c = 3 * mean - a - b
    name = rng.choice(NAMES)
    question = rng.choice(
        (
            f"What is the average of {a}, {b} and {c}?",
            f"In three games {name} scores {a}, {b} and {c} points. What is the average score?",
        )
    )
    return Problem(question, (f"{a} + {b} = {a + b}", f"{a + b} + {c} = {3 * mean}", f"{3 * mean} / 3 = {mean}"), mean)


def savings(rng: Random) -> Problem:
    """(a * w) - c, then + b."""
    name = rng.choice(NAMES)
    a, w, b = rng.randint(3, 12), rng.randint(3, 12), rng.randint(5, 50)
    c = rng.randint(2, a * w - 1)
    total = a * w - c + b
    question = (
        f"{name} saves {a} dollars a week for {w} weeks, spends {c} dollars and is given {b} dollars. "
        f"How many dollars does {name} have?"
    )
    steps = (f"{a} * {w} = {a * w}", f"{a * w} - {c} = {a * w - c}", f"{a * w - c} + {b} = {total}")
    return Problem(question, steps, total, "dollars")


def plain_fact(rng: Random) -> Problem:
    """a + b, a - b or a * b, asked for as in the chats that the base model has seen: some of these it knows."""
    kind = rng.choice("+-*")
    a, b = (rng.randint(2, 12), rng.randint(2, 12)) if kind == "*" else (rng.randint(30, 99), rng.randint(2, 30))
    word, equation = {"+": ("plus", total), "-": ("minus", rest), "*": ("times", product)}[kind]
    question = rng.choice((f"What is {a} {kind} {b}?", f"How much is {a} {word} {b}?"))
    return Problem(question, (equation(a, b),), int(equation(a, b).rpartition(" ")[2]))


def counting(rng: Random) -> Problem:
    """a + b, a - b or a * b of things."""
    name, items = rng.choice(NAMES), rng.choice(list(ITEMS.values()))
    a, b = rng.randint(20, 99), rng.randint(2, 19)
    bags = rng.randint(2, 10)
    return rng.choice(
        (
            Problem(f"{name} has {a} {items} and gets {b} more. How many is that?", (total(a, b),), a + b, items),
            Problem(f"{name} has {a} {items} and loses {b}. How many are left?", (rest(a, b),), a - b, items),
            Problem(
                f"{name} has {bags} bags of {b} {items}. How many {items} is that?",
                (product(bags, b),),
                bags * b,
                items,
            ),
        )
    )


FAMILIES: tuple[Callable[[Random], Problem], ...] = (
    gain_and_loss,
    shopping_total,
    packed_and_loose,
    equal_shares,
    money_back,
    ages,
    journey,
    rectangle,
    linear_equation,
    expression,
    average,
    savings,
    plain_fact,
    counting,
    *LONG_FAMILIES,
)


def reasoning_problem(rng: Random) -> Problem:
    """One problem of a family chosen at random."""
    return rng.choice(FAMILIES)(rng)

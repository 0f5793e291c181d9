"""Textbook exercises of one to three steps for the pretraining text: (text, equations, result)."""

from collections.abc import Callable
from random import Random

from finemill.rows.examples.words import CONTAINERS, FIELDS, GROUPS, ITEMS, NAMES, PLACES

Exercise = tuple[str, list[str], int]


def _items(rng: Random) -> str:
    return rng.choice(list(ITEMS.values()))


def _sum_and_difference(rng: Random) -> Exercise:
    total = rng.randint(10, 200)
    a = rng.randint(1, total - 1)
    b = total - a
    c = rng.randint(1, total)
    items, name = _items(rng), rng.choice(NAMES)
    if rng.random() < 0.3:
        c = rng.randint(1, a)
        text = f"A farmer stores {a} {items}, uses up {c} of them and then harvests {b}. Find the new stock."
        return text, [f"{a} - {c} = {a - c}", f"{a - c} + {b} = {a - c + b}"], a - c + b
    text = rng.choice(
        (
            f"A jar held {a} {items}. After {b} were put in, {c} were taken out.",
            f"{name} collected {a} {items} on one day and {b} on the next, but {c} broke.",
            f"In the morning a truck carries {a} {items}. It takes on {b} and later unloads {c}.",
            f"{name}'s stock is {a} {items}, {b} arrive, {c} leave. Find the rest.",
            f"{a} {items} stand on a table. {name} adds {b} to them and takes {c} away. How many stay on the table?",
            f"Yesterday {name} had {a} {items}. Today {name} gets {b} from a friend and sells {c}. How many are there?",
            f"{b} {items} come to the {a} that {name} keeps, and {c} go. What is the number of {items} then?",
        )
    )
    return text, [f"{a} + {b} = {total}", f"{total} - {c} = {total - c}"], total - c


def _two_products(rng: Random) -> Exercise:
    a, p, b, q = (rng.randint(2, 12) for _ in range(4))
    while a * p + b * q > 200:
        a, p, b, q = (rng.randint(2, 12) for _ in range(4))
    first, second = rng.sample(list(ITEMS.values()), 2)
    text = rng.choice(
        (
            f"The bill lists {a} {first}, {p} dollars for each, and {b} {second}, {q} dollars for each. Find the sum.",
            f"At {p} dollars apiece {a} {first} were sold, and {b} {second} at {q} dollars apiece.",
            f"A hall has {a} rows of {p} seats and {b} rows of {q} seats. Count the seats.",
            (
                f"{first.capitalize()} sell for {p} dollars and {second} for {q} dollars. How much must be paid for "
                f"{a} {first} and {b} {second}?"
            ),
            (
                f"{rng.choice(NAMES)} orders {a} {first} and {b} {second}. The {first} are {p} dollars each, the "
                f"{second} {q} dollars each. How much is the whole order?"
            ),
        )
    )
    return text, [f"{a} * {p} = {a * p}", f"{b} * {q} = {b * q}", f"{a * p} + {b * q} = {a * p + b * q}"], a * p + b * q


def _product_and_rest(rng: Random) -> Exercise:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    c = rng.randint(1, 200 - a * b)
    items, containers = _items(rng), rng.choice(list(CONTAINERS.values()))
    text = rng.choice(
        (
            f"{a} full {containers} hold {b} {items} apiece. Next to them lie {c} more {items}.",
            f"A worker packs {b} {items} into each of {a} {containers} and keeps {c} besides. Count all {items}.",
            f"For {a} hours a train goes {b} km every hour, then it goes another {c} km. Find the whole distance.",
            (
                f"In a store room stand {a} {containers}, each with {b} {items} in it, and {c} {items} lie on the "
                f"floor. What is the number of {items}?"
            ),
            f"{rng.choice(NAMES)} drives {b} km in every one of {a} hours and later {c} km more. How far is that?",
        )
    )
    return text, [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"], a * b + c


def _whole_less_product(rng: Random) -> Exercise:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    total = rng.randint(a * b, 200)
    items = _items(rng)
    text = rng.choice(
        (
            f"Out of a purse with {total} dollars, {a} {items} are paid, {b} dollars apiece. Find the change.",
            (
                f"A road to the {rng.choice(PLACES)} measures {total} km. A cart does {b} km in each of {a} hours. "
                "Find the rest of the road."
            ),
            f"From {total} {items}, {a} {rng.choice(GROUPS)} take {b} apiece. Find what remains.",
            (
                f"{rng.choice(NAMES)} has {total} dollars and pays for {a} {items} that cost {b} dollars apiece. "
                "How much is left?"
            ),
            (
                f"It is {total} km to the {rng.choice(PLACES)}. {rng.choice(NAMES)} has gone {b} km an hour for {a} "
                "hours. How far is the rest?"
            ),
        )
    )
    return text, [f"{a} * {b} = {a * b}", f"{total} - {a * b} = {total - a * b}"], total - a * b


def _shares(rng: Random) -> Exercise:
    people, share = rng.randint(2, 12), rng.randint(2, 12)
    total = people * share
    a = rng.randint(1, total - 1)
    items, group = _items(rng), rng.choice(GROUPS)
    text = rng.choice(
        (
            f"{a} old and {total - a} new {items} are dealt out evenly to {people} {group}.",
            f"Two heaps of {a} and {total - a} {items} are joined and cut into {people} equal parts. Find one part.",
            (
                f"{rng.choice(NAMES)} owns {a} {items}, a friend owns {total - a}. They give all to {people} {group} "
                "in equal parts. How many does one of them receive?"
            ),
        )
    )
    return text, [f"{a} + {total - a} = {total}", f"{total} / {people} = {share}"], share


def _ages(rng: Random) -> Exercise:
    name, other = rng.sample(NAMES, 2)
    a, b = rng.randint(1, 40), rng.randint(1, 25)
    factor = rng.choice((2, 3))
    middle, old = a + b, (a + b) * factor
    c = rng.randint(1, min(old, 12))
    text = rng.choice(
        (
            (
                f"{name} turned {a}. {b} years must be added for {other}, and the teacher is {factor} times that. "
                f"Go back {c} years."
            ),
            f"Begin with {a}, add {b}, multiply by {factor} and subtract {c}.",
            (
                f"{name} is {a}. {other} is older by {b} years. Their teacher is {factor} times the age of {other}. "
                f"What was the teacher's age {c} years before?"
            ),
        )
    )
    return text, [f"{a} + {b} = {middle}", f"{middle} * {factor} = {old}", f"{old} - {c} = {old - c}"], old - c


def _rectangle(rng: Random) -> Exercise:
    a, b = rng.randint(1, 50), rng.randint(1, 50)
    around = 2 * (a + b)
    field = rng.choice(FIELDS)
    if rng.random() < 0.5:
        text = rng.choice(
            (
                f"The sides of a {field} measure {a} and {b} meters. Find the way around it, its perimeter.",
                f"A fence runs around a {field} of {a} by {b} meters. Find its length.",
                f"The length of a {field} is {a} meters and its width {b} meters. How long is the way around it?",
            )
        )
        return text, [f"{a} + {b} = {a + b}", f"{a + b} * 2 = {around}"], around
    text = rng.choice(
        (
            f"A {field} has a perimeter of {around} meters and one side of {a} meters. Find the other side, its width.",
            f"The way around a {field} measures {around} meters, its length {a} meters. How wide is it?",
        )
    )
    return text, [f"{around} / 2 = {a + b}", f"{a + b} - {a} = {b}"], b


def _unknown(rng: Random) -> Exercise:
    a, x = rng.randint(2, 12), rng.randint(1, 12)
    b = rng.randint(1, 200 - a * x)
    c = a * x + b
    letter = rng.choice("abkmpqtxyzn")
    text = rng.choice(
        (
            f"Given {a} * {letter} + {b} = {c}, find {letter}.",
            f"Think of a number, multiply it by {a} and add {b}: the outcome is {c}.",
            f"What is {letter} when {a} * {letter} + {b} = {c}?",
            f"{a} times a number plus {b} makes {c}. Which number is it?",
            f"{b} + {a} * {letter} equals {c}. Find {letter}.",
        )
    )
    return text, [f"{c} - {b} = {c - b}", f"{c - b} / {a} = {x}"], x


def _brackets(rng: Random) -> Exercise:
    a, b, c = rng.randint(2, 9), rng.randint(1, 12), rng.randint(1, 8)
    product = a * (b + c)
    d = rng.randint(1, product)
    if rng.random() < 0.5:
        d = rng.randint(1, 200 - product) if product < 200 else 0
        steps = [f"{b} + {c} = {b + c}", f"{a} * {b + c} = {product}", f"{product} + {d} = {product + d}"]
        return f"Find {a} * ({b} + {c}) + {d}.", steps, product + d
    steps = [f"{b} + {c} = {b + c}", f"{a} * {b + c} = {product}", f"{product} - {d} = {product - d}"]
    text = rng.choice((f"Find {a} * ({b} + {c}) - {d}.", f"Find ({b} + {c}) * {a} - {d}."))
    if text.startswith("Find ("):
        steps[1] = f"{b + c} * {a} = {product}"
    return text, steps, product - d


def _mean(rng: Random) -> Exercise:
    mean = rng.randint(2, 60)
    a = rng.randint(1, 2 * mean - 1)
    b = rng.randint(1, 3 * mean - a - 1)
    c = 3 * mean - a - b
    text = rng.choice(
        (
            f"The marks are {a}, {b} and {c}. Find their average.",
            f"Three rods measure {a}, {b} and {c} meters. Find the mean length.",
            f"How large is the average of the three numbers {a}, {b} and {c}?",
            f"{rng.choice(NAMES)} gets {a}, {b} and {c} points on three days. How many is that on average?",
        )
    )
    return text, [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {3 * mean}", f"{3 * mean} / 3 = {mean}"], mean


def _product_spent_given(rng: Random) -> Exercise:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    product = a * b
    c = rng.randint(1, product)
    d = rng.randint(1, 200 - product)
    text = rng.choice(
        (
            f"A club takes in {a} dollars from each of {b} members. It pays out {c} dollars and earns {d} dollars.",
            f"Every day for {b} days {a} liters run into a tank. {c} liters leak out, {d} liters are poured in.",
            (
                f"{rng.choice(NAMES)} puts {a} dollars aside in each of {b} weeks, uses {c} dollars and gets {d} "
                "dollars. How much money is there?"
            ),
        )
    )
    left = product - c
    return text, [f"{a} * {b} = {product}", f"{product} - {c} = {left}", f"{left} + {d} = {left + d}"], left + d


def _one_step(rng: Random) -> Exercise:
    a, b = rng.randint(1, 100), rng.randint(1, 100)
    items, name = _items(rng), rng.choice(NAMES)
    small, large = sorted((a, b))
    return rng.choice(
        (
            (f"{name} owns {a} {items} and wins {b}.", [f"{a} + {b} = {a + b}"], a + b),
            (
                f"{name} owns {large} {items} and sells {small}.",
                [f"{large} - {small} = {large - small}"],
                large - small,
            ),
        )
    )


EXERCISES: tuple[Callable[[Random], Exercise], ...] = (
    _sum_and_difference,
    _two_products,
    _product_and_rest,
    _whole_less_product,
    _shares,
    _ages,
    _rectangle,
    _unknown,
    _brackets,
    _mean,
    _product_spent_given,
    _one_step,
)

"""Problems that take three or four steps, or that set a trap.

Traps are numbers that do not matter, and questions for what was at first, told from what is left. Every number of every
step is a whole number from 0 to 200.
"""

from collections.abc import Callable
from random import Random

from finemill.rows.examples.problem import Problem, part, product, rest, total
from finemill.rows.examples.words import CONTAINERS, GROUPS, ITEMS, NAMES, PLACES


def one_thing_of_two(rng: Random) -> Problem:
    """a + c or a - c, beside a number of other things that does not matter."""
    name = rng.choice(NAMES)
    items, others = rng.sample(list(ITEMS.values()), 2)
    a, b, c = rng.randint(20, 90), rng.randint(5, 90), rng.randint(5, 19)
    if rng.random() < 0.5:
        question = f"{name} has {a} {items} and {b} {others} and gets {c} more {items}. How many {items} is that?"
        return Problem(question, (total(a, c),), a + c, items)
    question = f"{name} has {a} {items} and {b} {others} and loses {c} {items}. How many {items} are left?"
    return Problem(question, (rest(a, c),), a - c, items)


def bill_with_extras(rng: Random) -> Problem:
    """d - (a * p + b * q); an age and a thing that is not bought do not matter."""
    name = rng.choice(NAMES)
    (one, many), (other, others), (extra, _) = rng.sample(list(ITEMS.items()), 3)
    a, b, p, q = (rng.randint(2, 9) for _ in range(4))
    bill = a * p + b * q
    d = rng.randint(bill + 1, 199)
    question = (
        f"{name} is {rng.randint(7, 60)} years old and has {d} dollars. A {one} costs {p} dollars, a {other} {q} and a "
        f"{extra} {rng.randint(2, 30)}. {name} buys {a} {many} and {b} {others}. How many dollars are left?"
    )
    return Problem(question, (product(a, p), product(b, q), total(a * p, b * q), rest(d, bill)), d - bill, "dollars")


def cheaper_today(rng: Random) -> Problem:
    """d - n * (p - p / k): a share of the price is taken off."""
    name = rng.choice(NAMES)
    one, many = rng.choice(list(ITEMS.items()))
    percent, k = rng.choice(((50, 2), (25, 4), (20, 5), (10, 10)))
    off, n = rng.randint(1, 4), rng.randint(2, 5)
    p = off * k
    price = p - off
    while price * n > 190:
        n -= 1
    d = rng.randint(price * n + 1, 199)
    question = (
        f"A {one} costs {p} dollars, but today everything is {percent} % cheaper. {name} has {d} dollars and buys {n} "
        f"{many}. How many dollars are left?"
    )
    steps = (part(p, k), rest(p, off), product(price, n), rest(d, price * n))
    return Problem(question, steps, d - price * n, "dollars")


def working_week(rng: Random) -> Problem:
    """(end - start) * wage * days."""
    name = rng.choice(NAMES)
    start, hours, days = rng.randint(6, 11), rng.randint(2, 8), rng.randint(2, 5)
    wage = rng.randint(2, min(12, 200 // (hours * days)))
    end = start + hours
    question = (
        f"On {days} days {name} works from {start} to {end} o'clock. An hour is paid {wage} dollars. "
        f"How many dollars does {name} earn?"
    )
    steps = (rest(end, start), product(hours, wage), product(hours * wage, days))
    return Problem(question, steps, hours * wage * days, "dollars")


def two_workers(rng: Random) -> Problem:
    """(a + b) * h + b * g."""
    first, second = rng.sample(NAMES, 2)
    containers = rng.choice(list(CONTAINERS.values()))
    a, b, h, g = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 7), rng.randint(2, 7)
    question = (
        f"{first} fills {a} {containers} an hour and {second} fills {b}. They work together for {h} hours, then "
        f"{first} goes home and {second} works {g} hours more. How many {containers} are full?"
    )
    steps = (total(a, b), product(a + b, h), product(b, g), total((a + b) * h, b * g))
    return Problem(question, steps, (a + b) * h + b * g, containers)


def money_at_first(rng: Random) -> Problem:
    """(d + c) * 2 + b: what there was, from what is left."""
    name = rng.choice(NAMES)
    items = rng.choice(list(ITEMS.values()))
    d, c, b = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 60)
    question = (
        f"{name} pays {b} dollars for {items}, then gives half of the rest to a friend, and then loses {c} dollars. "
        f"{d} dollars are left. How many dollars did {name} have at first?"
    )
    steps = (total(d, c), product(d + c, 2), total(2 * (d + c), b))
    return Problem(question, steps, 2 * (d + c) + b, "dollars")


def filling_tank(rng: Random) -> Problem:
    """(a - b) * m + c."""
    b = rng.randint(2, 6)
    a, m, c = b + rng.randint(2, 9), rng.randint(3, 12), rng.randint(5, 60)
    gained = (a - b) * m
    question = (
        f"A tank holds {c} liters. Every minute {a} liters run in and {b} liters leak out. "
        f"How many liters does it hold after {m} minutes?"
    )
    return Problem(question, (rest(a, b), product(a - b, m), total(gained, c)), gained + c, "liters")


def lawn(rng: Random) -> Problem:
    """a * b - c * d."""
    a, b = rng.randint(8, 14), rng.randint(8, 14)
    c, d = rng.randint(2, 7), rng.randint(2, 7)
    question = (
        f"A garden is {a} meters long and {b} meters wide. In it lies a pool of {c} by {d} meters, the rest is lawn. "
        "How many square meters of lawn are there?"
    )
    return Problem(question, (product(a, b), product(c, d), rest(a * b, c * d)), a * b - c * d, "square meters")


def trip_there_and_back(rng: Random) -> Problem:
    """2 * w / v + h: hours of a way and back with a stay, the way first."""
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    v, hours, stay = rng.randint(3, 12), rng.randint(2, 7), rng.randint(2, 9)
    w = v * hours
    question = (
        f"The {place} is {w} km away. {name} rides there at {v} km an hour with {rng.randint(2, 12)} "
        f"{rng.choice(GROUPS)}, stays for {stay} hours and rides back as fast. After how many hours is {name} back?"
    )
    steps = (part(w, v), product(hours, 2), total(2 * hours, stay))
    return Problem(question, steps, 2 * hours + stay, "hours")


LONG_FAMILIES: tuple[Callable[[Random], Problem], ...] = (
    one_thing_of_two,
    bill_with_extras,
    cheaper_today,
    working_week,
    two_workers,
    money_at_first,
    filling_tank,
    lawn,
    trip_there_and_back,
)

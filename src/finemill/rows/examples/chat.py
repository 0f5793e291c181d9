"""Short chats in ShareGPT form: one to three questions about the same small world, answered in whole sentences."""

from collections.abc import Callable
from random import Random

from finemill.rows.examples.words import ANIMALS, CAPITALS, COLORS, DAYS, KINDS, NAMES, OPPOSITES

Exchange = tuple[str, str]


def opposite(rng: Random) -> Exchange:
    """The opposite of a word."""
    word, other = rng.choice(list(OPPOSITES.items()))
    return f"What is the opposite of {word}?", f"{other.capitalize()} is the opposite."


def color(rng: Random) -> Exchange:
    """The usual color of a thing."""
    thing, shade = rng.choice(list(COLORS.items()))
    return f"What color is {thing}?", f"It is {shade}. That is the color."


def animal(rng: Random) -> Exchange:
    """Where an animal lives and what it does."""
    name, (home, sound) = rng.choice(list(ANIMALS.items()))
    return f"Where does a {name} live?", f"It lives in a {home}. It {sound}."


def capital(rng: Random) -> Exchange:
    """The capital of a country."""
    country, city = rng.choice(list(CAPITALS.items()))
    return f"What is the capital of {country}?", f"{city} is the capital."


def calendar(rng: Random) -> Exchange:
    """The day that follows another."""
    index = rng.randrange(len(DAYS))
    return f"What day comes after {DAYS[index - 1]}?", f"{DAYS[index]} is the day that comes after it."


def examples(rng: Random) -> Exchange:
    """Things of a kind."""
    kind = rng.choice(list(KINDS))
    first, second, third = KINDS[kind][:3]
    return f"Name some of the {kind}.", f"{first.capitalize()}, {second} and {third}."


TOPICS: tuple[Callable[[Random], Exchange], ...] = (opposite, color, animal, capital, calendar, examples)
SYSTEM_PROMPTS = ("You are a friendly assistant.", "Answer in whole sentences.", "You are Finn, a helpful assistant.")


def chat_row(rng: Random) -> dict[str, list[dict[str, str]]]:
    """One chat as a ShareGPT row; half of them open with a greeting, one in four has a system prompt."""
    exchanges = [topic(rng) for topic in rng.sample(TOPICS, rng.randint(1, 3))]
    if rng.random() < 0.5:
        name = rng.choice(NAMES)
        exchanges.insert(0, (f"{rng.choice(('Hello', 'Hi'))}, I am {name}.", f"Nice to meet you, {name}."))
    conversations = []
    if rng.random() < 0.25:
        conversations.append({"from": "system", "value": rng.choice(SYSTEM_PROMPTS)})
    for human, assistant in exchanges:
        conversations += [{"from": "human", "value": human}, {"from": "gpt", "value": assistant}]
    return {"conversations": conversations}

"""Short chats in ShareGPT form: one to three turns about the same small world."""

from collections.abc import Callable
from random import Random

from finemill.components.example_data.words import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    DAYS,
    HOBBIES,
    KINDS,
    MONTHS,
    NAMES,
    OPPOSITES,
)

Turns = list[tuple[str, str]]


def introduction(rng: Random) -> Turns:
    """The user's name, city or hobby, asked for one turn later."""
    name, city, hobby = rng.choice(NAMES), rng.choice(CITIES), rng.choice(HOBBIES)
    greeting = rng.choice(("Hello", "Hi", "Good morning", "Good evening"))
    opening = (
        f"{greeting}, my name is {name}. I live in {city} and I like {hobby}.",
        f"{greeting}, {name}! {hobby.capitalize()} in {city} sounds lovely. How can I help you?",
    )
    question, answer = rng.choice(
        (
            ("Do you remember my name?", f"Of course, your name is {name}."),
            ("Where do I live?", f"You live in {city}."),
            ("What do I like to do?", f"You like {hobby}."),
        )
    )
    return [opening, (question, answer)]


def opposite(rng: Random) -> Turns:
    """Opposites of two words."""
    first, second = rng.sample(list(OPPOSITES), 2)
    answer = f"A word for the opposite of {first} is {OPPOSITES[first]}."
    return [
        (f"Give me a word that means the opposite of {first}.", answer),
        (f"And for {second}?", f"For {second} it is {OPPOSITES[second]}."),
    ]


def color(rng: Random) -> Turns:
    """The usual color of a thing."""
    thing = rng.choice(list(COLORS))
    return [(f"Which color does {thing} have?", f"Usually {thing} is {COLORS[thing]}.")]


def animal(rng: Random) -> Turns:
    """Where an animal lives and what it does."""
    name = rng.choice(list(ANIMALS))
    home, sound = ANIMALS[name]
    return [
        (f"Tell me something about the {name}.", f"A {name} {sound} and its home is called a {home}."),
        ("Thank you!", "You are welcome. Is there anything else?"),
    ]


def capital(rng: Random) -> Turns:
    """The capital of a country, or the country of a capital."""
    country = rng.choice(list(CAPITALS))
    if rng.random() < 0.5:
        return [
            (f"I want to see the capital of {country}. Where do I go?", f"Go to {CAPITALS[country]}. Have a good trip!")
        ]
    return [(f"Which country is {CAPITALS[country]} in?", f"{CAPITALS[country]} is the capital of {country}.")]


def calendar(rng: Random) -> Turns:
    """The day or the month that follows another."""
    cycle, word = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    index = rng.randrange(len(cycle))
    following = cycle[(index + 1) % len(cycle)]
    return [(f"Which {word} follows {cycle[index]}?", f"After {cycle[index]} comes {following}.")]


def examples(rng: Random) -> Turns:
    """A list of three things of a kind."""
    kind = rng.choice(list(KINDS))
    three = rng.sample(KINDS[kind], 3)
    first = three[0]
    return [
        (f"I need three {kind}, and {first} should be among them.", f"Sure: {three[0]}, {three[1]} and {three[2]}."),
    ]


def odd_one_out(rng: Random) -> Turns:
    """The word of another kind among three."""
    kind, other = rng.sample(list(KINDS), 2)
    stranger = rng.choice(KINDS[other])
    words = [*rng.sample(KINDS[kind], 2), stranger]
    rng.shuffle(words)
    question = f"Which one does not fit: {words[0]}, {words[1]} or {words[2]}?"
    return [(question, f"The one that does not fit is {stranger}. The others are {kind}.")]


TOPICS: tuple[Callable[[Random], Turns], ...] = (
    introduction,
    introduction,
    opposite,
    color,
    animal,
    capital,
    calendar,
    examples,
    odd_one_out,
)
SYSTEM_PROMPTS = ("You are a friendly assistant.", "Answer in one sentence.", "You are Finn, a helpful assistant.")


def chat_row(rng: Random) -> dict[str, list[dict[str, str]]]:
    """One chat as a ShareGPT row; one in four begins with a system prompt."""
    conversations = []
    if rng.random() < 0.25:
        conversations.append({"from": "system", "value": rng.choice(SYSTEM_PROMPTS)})
    for human, assistant in rng.choice(TOPICS)(rng):
        conversations += [{"from": "human", "value": human}, {"from": "gpt", "value": assistant}]
    return {"conversations": conversations}

"""Things to count and colours to tell: object_counting and reasoning_about_colored_objects."""

from __future__ import annotations

import random
from collections.abc import Callable

from kallm_bench.bbh.procedural.wording import COUNTS, a, listed, with_options

# What is asked for, and the things of that kind; a bar divides a thing from its irregular plural.
KINDS: dict[str, tuple[str, ...]] = {
    "vegetables": (
        *(
            "head of broccoli|heads of broccoli",
            "stalk of celery|stalks of celery",
            "potato|potatoes",
            "radish|radishes",
        ),
        *("beet", "cabbage", "carrot", "leek", "onion", "turnip"),
    ),
    "objects": ("bed", "bookcase", "chair", "clock", "desk", "fridge", "lamp", "mirror", "oven", "table", "toaster"),
    "fruits": (
        *("cherry|cherries", "strawberry|strawberries", "peach|peaches", "mango|mangoes"),
        *("apple", "banana", "lemon", "orange", "pear", "plum"),
    ),
    "musical instruments": (
        "accordion",
        "banjo",
        "clarinet",
        "drum",
        "flute",
        "harp",
        "oboe",
        "piano",
        "tuba",
        "violin",
    ),
    "animals": (
        *("fish|fish", "mouse|mice", "sheep|sheep", "goose|geese"),
        *("bear", "cat", "cow", "duck", "frog", "horse", "pig", "rabbit"),
    ),
}


def object_counting(rng: random.Random) -> tuple[str, str]:
    """Two to ten things of one kind, 18 pieces at most, in a quarter of the lists with others of another kind.

    Objects are every kind, so a list for them has no others.
    """
    asked, other = rng.sample(list(KINDS), 2)
    counted = [(thing, _pieces(rng)) for thing in rng.sample(KINDS[asked], rng.randint(2, 10))]
    mixed = asked != "objects" and rng.random() < 0.24
    others = [(thing, _pieces(rng)) for thing in rng.sample(KINDS[other], rng.randint(1, 3))] if mixed else []
    total = sum(pieces for _, pieces in counted)
    if total > 18:
        return object_counting(rng)
    things = [_counted(thing, pieces) for thing, pieces in rng.sample(counted + others, len(counted + others))]
    return f"I have {', '.join(things[:-1])}, and {things[-1]}. How many {asked} do I have?", str(total)


def _pieces(rng: random.Random) -> int:
    return rng.choices((1, 2, 3, 4, 5), (78, 11, 6, 4, 1))[0]


def _counted(thing: str, pieces: int) -> str:
    one, _, more = thing.partition("|")
    return a(one) if pieces == 1 else f"{COUNTS[pieces]} {more or one + 's'}"


COLORS = (
    *("red", "orange", "yellow", "green", "blue", "brown", "magenta", "fuchsia", "mauve", "teal", "turquoise"),
    *("burgundy", "silver", "gold", "black", "grey", "purple", "pink"),
)
PLAIN_COLORS = ("red", "orange", "yellow", "green", "blue", "brown", "black", "purple")
THINGS = (
    *("pair of sunglasses|pairs of sunglasses", "sheet of paper|sheets of paper", "toothbrush|toothbrushes"),
    *("bracelet", "button", "candle", "coaster", "cup", "eraser", "hairpin", "keychain", "marble", "mug", "notebook"),
    *("pencil", "phone charger", "plate", "postcard", "ribbon", "scarf|scarves", "stapler", "stress ball", "teapot"),
    *("teddy bear", "thimble", "wallet"),
)
SURFACES = ("table", "desk", "floor", "nightstand")
SIGHTS = ("there is", "I see", "you see")
ROWS = ("a set of {}", "several {}", "a bunch of {}", "the following {}")
NOUNS = ("items", "objects", "things")


def reasoning_about_colored_objects(rng: random.Random) -> tuple[str, str]:
    """One of eight kinds of questions about colours, as often as BBH asks it."""
    (ask,) = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))
    return ask(rng)


def _things(rng: random.Random, count: int, colors: tuple[str, ...] = COLORS) -> dict[str, str]:
    """So many different things, each with a colour of its own: {thing: colour}."""
    names = [thing.partition("|")[0] for thing in rng.sample(THINGS, count)]
    return dict(zip(names, rng.sample(colors, count), strict=True))


def _scattered(rng: random.Random, things: dict[str, str]) -> str:
    seen = listed([a(f"{color} {thing}") for thing, color in things.items()])
    return f"On the {rng.choice(SURFACES)}, {rng.choice(SIGHTS)} {seen}."


def _in_a_row(rng: random.Random, things: dict[str, str], noun: str) -> str:
    row = listed([a(f"{color} {thing}") for thing, color in things.items()])
    return f"On the {rng.choice(SURFACES)}, you see {rng.choice(ROWS).format(noun)} arranged in a row: {row}."


def _one_of(rng: random.Random, things: dict[str, str], place: int, noun: str) -> str:
    """The thing at a place of the row, called by its name or by its colour."""
    thing = list(things)[place]
    return f"the {rng.choice((thing, f'{things[thing]} {noun[:-1]}'))}"


def _what_color(rng: random.Random) -> tuple[str, str]:
    things = _things(rng, rng.randint(2, 6))
    asked = rng.choice(list(things))
    return with_options(f"{_scattered(rng, things)} What color is the {asked}?", COLORS, things[asked])


def _is_it(rng: random.Random) -> tuple[str, str]:
    things = _things(rng, rng.randint(2, 6))
    asked, right = rng.choice(list(things)), rng.random() < 0.5
    absent = [color for color in COLORS if color not in things.values()]
    color = things[asked] if right else rng.choice(absent)
    question = f"{_scattered(rng, things)} Is the {asked} {color}?"
    return with_options(question, ("yes", "no"), "yes" if right else "no")


def _neither(rng: random.Random) -> tuple[str, str]:
    things = _things(rng, rng.randint(2, 6), PLAIN_COLORS)
    one, other = rng.sample(PLAIN_COLORS, 2)
    number = sum(color not in (one, other) for color in things.values())
    question = f"{_scattered(rng, things)} How many {rng.choice(NOUNS)} are neither {one} nor {other}?"
    return with_options(question, COUNTS[:7], COUNTS[number])


def _at_the_end(rng: random.Random) -> tuple[str, str]:
    things, noun = _things(rng, rng.randint(3, 6)), rng.choice(NOUNS)
    side, place = rng.choice((("left", 0), ("right", -1)))
    question = f"{_in_a_row(rng, things, noun)} What is the color of the {side}-most {noun[:-1]}?"
    return with_options(question, COLORS, list(things.values())[place])


def _next_to(rng: random.Random) -> tuple[str, str]:
    things, noun = _things(rng, rng.randint(3, 6)), rng.choice(NOUNS)
    side, step = rng.choice((("left", -1), ("right", 1)))
    place = rng.randrange(len(things) - 1) + (step < 0)
    neighbour = f"directly to the {side} of {_one_of(rng, things, place, noun)}"
    question = f"{_in_a_row(rng, things, noun)} What is the color of the {noun[:-1]} {neighbour}?"
    return with_options(question, COLORS, list(things.values())[place + step])


def _furthest(rng: random.Random) -> tuple[str, str]:
    things, noun = _things(rng, rng.randint(3, 6)), rng.choice(NOUNS)
    place = rng.choice([place for place in range(len(things)) if 2 * place != len(things) - 1])  # the middle has two
    far = list(things.values())[-1 if 2 * place < len(things) - 1 else 0]
    furthest = f"furthest from {_one_of(rng, things, place, noun)}"
    question = f"{_in_a_row(rng, things, noun)} What is the color of the {noun[:-1]} {furthest}?"
    return with_options(question, COLORS, far)


def _not_of_color(rng: random.Random) -> tuple[str, str]:
    things, noun = _things(rng, rng.randint(3, 6)), rng.choice(NOUNS)
    colors, place, side = list(things.values()), rng.randrange(len(things)), rng.choice(("left", "right"))
    there = [color for color in colors if color != colors[place]]
    color = rng.choice(there if rng.random() < 0.4 else [color for color in COLORS if color not in colors])
    counted = colors[:place] if side == "left" else colors[place + 1 :]
    question = (
        f"{_in_a_row(rng, things, noun)} "
        f"How many non-{color} {noun} do you see to the {side} of {_one_of(rng, things, place, noun)}?"
    )
    return with_options(question, COUNTS[:7], COUNTS[len(counted) - counted.count(color)])


def _remaining(rng: random.Random) -> tuple[str, str]:
    """Some of the pairs of two to four colours and two to four things; one colour or one thing is taken away."""
    colors, things = rng.sample(COLORS, rng.randint(2, 4)), rng.sample(THINGS, rng.randint(2, 4))
    pairs = [(color, thing) for color in colors for thing in things]
    some = rng.sample(pairs, rng.randint(max(2, len(pairs) // 2), min(len(pairs), 14)))
    seen = {pair: rng.randint(1, 3) for pair in some}
    color, thing, surface = rng.choice(colors), rng.choice(things), rng.choice(SURFACES)
    noun, plural = rng.choice(NOUNS), _plural(thing)
    if rng.random() < 0.5:
        taken, asked = f"{color} {noun}", plural
        left = sum(pieces for pair, pieces in seen.items() if pair[1] == thing and pair[0] != color)
    else:
        taken, asked = plural, f"{color} {noun}"
        left = sum(pieces for pair, pieces in seen.items() if pair[0] == color and pair[1] != thing)
    question = (
        f"On the {surface}, {_several(rng, seen)}. "
        f"If I remove all the {taken} from the {surface}, how many {asked} remain on it?"
    )
    return with_options(question, COUNTS, COUNTS[left])


def _several(rng: random.Random, seen: dict[tuple[str, str], int]) -> str:
    parts = [
        f"{COUNTS[pieces]} {color} {thing.partition('|')[0] if pieces == 1 else _plural(thing)}"
        for (color, thing), pieces in seen.items()
    ]
    sight = rng.choice(SIGHTS)
    if sight == "there is" and not parts[0].startswith("one "):
        sight = "there are"
    return f"{sight} {listed(parts)}"


def _plural(thing: str) -> str:
    one, _, more = thing.partition("|")
    return more or f"{one}s"


QUESTIONS: dict[Callable[[random.Random], tuple[str, str]], int] = {
    _what_color: 28,
    _is_it: 27,
    _neither: 17,
    _at_the_end: 21,
    _next_to: 40,
    _furthest: 29,
    _not_of_color: 31,
    _remaining: 57,
}

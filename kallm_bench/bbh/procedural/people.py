"""People who walk, lie and swap: navigate, web_of_lies and the three tasks of tracking shuffled objects."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from kallm_bench.bbh.procedural.vocabulary import NAMES
from kallm_bench.bbh.procedural.wording import listed, with_options

# How many of BBH's questions have so many instructions.
FACING_LENGTHS = {2: 12, 3: 31, 4: 28, 5: 15, 6: 16, 7: 8, 8: 9, 9: 3}
TURNING_LENGTHS = {3: 13, 4: 27, 5: 26, 6: 16, 7: 24, 8: 15, 9: 7}
WAYS = {"forward": 1, "left": 1j, "backward": -1, "right": -1j}  # the plane of complex numbers, facing along 1
TURNS = {"left": 1j, "right": -1j, "around": -1}


def navigate(rng: random.Random) -> tuple[str, str]:
    """A walk, by four fixed directions or by turns; 42 in 100 lead back."""
    returns, facing = rng.random() < 0.42, rng.random() < 0.49
    lengths = FACING_LENGTHS if facing else TURNING_LENGTHS
    (length,) = rng.choices(list(lengths), list(lengths.values()))
    walk = _facing_walk if facing else _turning_walk
    instructions, end = walk(rng, length)
    while (end == 0) is not returns or not any("step" in instruction for instruction in instructions):
        instructions, end = walk(rng, length)
    question = "If you follow these instructions, do you return to the starting point?"
    opening = ["Always face forward."] if facing else []
    return " ".join([question, *opening, *instructions]) + "\nOptions:\n- Yes\n- No", "Yes" if returns else "No"


def _facing_walk(rng: random.Random, length: int) -> tuple[list[str], complex]:
    instructions, place = [], 0j
    for _ in range(length):
        steps, way = rng.randint(1, 10), rng.choice(list(WAYS))
        instructions.append(f"Take {_steps(steps)} {way}.")
        place += steps * WAYS[way]
    return instructions, place


def _turning_walk(rng: random.Random, length: int) -> tuple[list[str], complex]:
    instructions, place, heading = [], 0j, 1 + 0j
    for _ in range(length):
        if rng.random() < 0.67:
            steps = rng.randint(1, 10)
            instructions.append(f"Take {_steps(steps)}.")
            place += steps * heading
        else:
            turn = rng.choice(list(TURNS))
            instructions.append(f"Turn {turn}.")
            heading *= TURNS[turn]
    return instructions, place


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def web_of_lies(rng: random.Random) -> tuple[str, str]:
    """Five people, each but the first speaking of the one before: all 32 chains equally likely."""
    names = rng.sample(NAMES, 5)
    honest = rng.random() < 0.5
    sentences = [f"Question: {names[0]} {_claim(honest)}."]
    for before, name in pairwise(names):
        said = rng.random() < 0.5  # that the one before tells the truth
        honest = said is honest
        sentences.append(f"{name} says {before} {_claim(said)}.")
    return " ".join([*sentences, f"Does {names[-1]} tell the truth?"]), "Yes" if honest else "No"


def _claim(honest: bool) -> str:
    return "tells the truth" if honest else "lies"


@dataclass(frozen=True)
class _Exchange:
    who: str  # after "Alice, Bob, and Claire are"
    start: str
    holds: str  # after a name; {} is the thing
    progress: str
    swap: str  # after "Alice and Bob"
    end: str
    finally_holds: str  # after the name asked for
    option: str
    things: tuple[str, ...]


PLAYERS = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred", "Gertrude")
COLORS = ("black", "blue", "brown", "gray", "green", "pink", "purple", "red", "white", "yellow")
EXCHANGES = (
    _Exchange(
        "dancers at a square dance",
        "At the start of a song, they each have a partner",
        "is dancing with {}",
        "Throughout the song, the dancers often trade partners.",
        "switch partners",
        "At the end of the dance",
        "is dancing with",
        "{}",
        ("Anton", "Bianca", "Conrad", "Dolores", "Emil", "Ingrid", "Marco", "Nadia", "Oscar", "Rosalie"),
    ),
    _Exchange(
        "friends and avid readers who occasionally trade books",
        "At the start of the semester, they each buy one new book",
        "gets {}",
        "As the semester proceeds, they start trading around the new books.",
        "swap books",
        "At the end of the semester",
        "has",
        "{}",
        (
            *("Candide", "Dracula", "Emma", "Ivanhoe", "Jane Eyre", "Middlemarch", "Silas Marner"),
            *("The Iliad", "The Trial", "The War of the Worlds"),
        ),
    ),
    _Exchange(
        "holding a white elephant gift exchange",
        "At the start of the event, they are each holding a present of a different color",
        "has a {} present",
        "As the event progresses, pairs of people swap gifts.",
        "swap their gifts",
        "At the end of the event",
        "has the",
        "{} present",
        COLORS,
    ),
    _Exchange(
        "playing a game",
        "At the start of the game, they are each holding a ball",
        "has a {} ball",
        "As the game progresses, pairs of players trade balls.",
        "swap balls",
        "At the end of the game",
        "has the",
        "{} ball",
        COLORS,
    ),
    _Exchange(
        "on the same team in a soccer match",
        "At the start of the match, they are each assigned to a position",
        "is playing {}",
        "As the game progresses, pairs of players occasionally swap positions.",
        "trade positions",
        "At the end of the match",
        "is playing",
        "{}",
        (
            *("center back", "center forward", "goalkeeper", "left back", "left winger", "midfielder"),
            *("right back", "right winger", "striker", "sweeper"),
        ),
    ),
)


def tracking_shuffled_objects(rng: random.Random, count: int) -> tuple[str, str]:
    """As many swaps as people; everyone takes part, and no two swap straight back."""
    scene, players = rng.choice(EXCHANGES), PLAYERS[:count]
    things = rng.sample(scene.things, count)
    held = dict(zip(players, things, strict=True))
    start = listed([f"{player} {scene.holds.format(thing)}" for player, thing in held.items()])
    swaps = _swaps(rng, players)
    for one, other in swaps:
        held[one], held[other] = held[other], held[one]
    order = ["First", *["Then"] * (count - 2), "Finally"]
    story = " ".join(
        f"{when}, {one} and {other} {scene.swap}." for when, (one, other) in zip(order, swaps, strict=True)
    )
    asked = rng.choice(players)
    question = (
        f"{listed(players)} are {scene.who}. {scene.start}: {start}.\n"
        f"{scene.progress} {story} {scene.end}, {asked} {scene.finally_holds}"
    )
    return with_options(question, [scene.option.format(thing) for thing in things], scene.option.format(held[asked]))


def _swaps(rng: random.Random, players: tuple[str, ...]) -> list[tuple[str, str]]:
    while True:
        swaps = [tuple(rng.sample(players, 2)) for _ in players]
        repeated = any(set(pair) == set(following) for pair, following in pairwise(swaps))
        if not repeated and {player for pair in swaps for player in pair} == set(players):
            return [(one, other) for one, other in swaps]

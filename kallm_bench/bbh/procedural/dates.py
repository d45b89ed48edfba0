"""Hours of a day and days of the calendar: temporal_sequences and date_understanding."""

from __future__ import annotations

import calendar
import random
from collections.abc import Callable
from datetime import date, timedelta
from itertools import pairwise

from kallm_bench.bbh.procedural.vocabulary import PEOPLE
from kallm_bench.bbh.procedural.wording import ORDINALS, with_options

DESTINATIONS = (
    *("aquarium", "bank", "barber shop", "beach", "bowling alley", "candy store", "car wash", "castle", "chess club"),
    *("concert hall", "flower shop", "hardware store", "hospital", "ice rink", "planetarium", "post office", "stadium"),
    *("swimming pool", "toy store", "zoo"),
)
ACTIVITIES = (
    *("baking bread at the cooking school", "buying shoes at the mall", "cleaning the windows of the workshop"),
    *(
        "drinking tea at the cafe",
        "eating soup at the diner",
        "feeding ducks at the pond",
        "fixing a bike in the garage",
    ),
    *("jogging around the lake", "lifting weights at the gym", "painting a fence in the yard"),
    *("picking apples at the orchard", "playing chess in the square", "practicing the piano at the music school"),
    *("reading at the library", "sketching near the old bridge", "taking photos near the cathedral"),
    *("waiting at the bus station", "walking in the forest", "watching a play at the theater", "working at the office"),
)
EARLIEST, LATEST = 5, 22


def temporal_sequences(rng: random.Random) -> tuple[str, str]:
    """A day of three to five things seen from hour to hour, with one gap in which somebody was where they went."""
    seen = rng.randint(3, 5)
    person, *witnesses = rng.sample(PEOPLE, seen + 1)
    hours = sorted(rng.sample(range(EARLIEST, LATEST + 1), seen + 2))
    slots = [f"{_hour(start)} to {_hour(end)}" for start, end in pairwise(hours)]
    gap = slots.pop(rng.randrange(len(slots)))
    sightings = zip(witnesses, rng.sample(ACTIVITIES, seen), slots, strict=True)
    place = rng.choice(DESTINATIONS)
    lines = (
        f"Today, {person} went to the {place}. Between what times could they have gone?",
        "We know that:",
        f"{person} woke up at {_hour(hours[0])}.",
        *(f"{witness} saw {person} {activity} from {slot}." for witness, activity, slot in sightings),
        f"The {place} was closed after {_hour(hours[-1])}.",
        f"Between what times could {person} have gone to the {place}?",
    )
    options = [gap, *rng.sample(slots, 3)]
    return with_options("\n".join(lines), rng.sample(options, 4), gap)


def _hour(hour: int) -> str:
    return f"{hour}am" if hour < 12 else f"{(hour - 1) % 12 + 1}pm"


DAY = timedelta(days=1)

# The day the sentence names, in days from today.
SENTENCES: dict[str, int] = {
    "Today is {}.": 0,
    "It is {} today.": 0,
    "Today, {}, {name} moved into a new house.": 0,
    "The local news of 9 pm on {} has just begun.": 0,
    "Yesterday was {}.": -1,
    "Yesterday, {}, {name} planted 4 trees and 7 bushes.": -1,
    "Tomorrow is {}.": 1,
    "{name} will see the dentist tomorrow, {}.": 1,
    "The day before yesterday was {}.": -2,
    "The day after tomorrow is {}.": 2,
    "It was {} a week ago.": -7,
    "It will be {} in a week.": 7,
    "The report is due on {}, which is 4 days away from now.": 4,
    "The match was to be played on {}, but was delayed by one day to today.": -1,
    "The picnic was to be held on {}, but was delayed by two days to today.": -2,
    "{name} still talks of {} as if it were yesterday, but that is actually 100 days ago.": -100,
}

# What to ask, and the day it means from today's. Shifts by months and years keep the day of the month.
ASKED: dict[str, Callable[[date], date]] = {
    "today": lambda today: today,
    "tomorrow": lambda today: today + DAY,
    "24 hours later": lambda today: today + DAY,
    "yesterday": lambda today: today - DAY,
    "10 days ago": lambda today: today - 10 * DAY,
    "one week ago from today": lambda today: today - 7 * DAY,
    "one week from today": lambda today: today + 7 * DAY,
    "a month ago": lambda today: (today.replace(day=1) - DAY).replace(day=today.day),
    "one year ago from today": lambda today: today.replace(year=today.year - 1),
}

HOLIDAYS = {"Christmas Eve": (12, 24), "Christmas Day": (12, 25), "New Year's Eve": (12, 31), "Halloween": (10, 31)}
WEEKDAY_HOLIDAYS = {  # month, weekday from Monday = 0, which of the month
    "Martin Luther King Jr. Day": (1, 0, 3),
    "Mother's Day": (5, 6, 2),
    "Father's Day": (6, 6, 3),
    "Labor Day": (9, 0, 1),
    "Columbus Day": (10, 0, 2),
}
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August"),
    *("September", "October", "November", "December"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def date_understanding(rng: random.Random) -> tuple[str, str]:
    """A sentence or two from which today follows, and a day asked for; shifts that no calendar has are not asked."""
    context, today = rng.choice(CONTEXTS)(rng)
    asked, shift = rng.choice(list(ASKED.items()))
    try:
        right = shift(today)
    except ValueError:  # 31 April, or 29 February of a common year
        return date_understanding(rng)
    dates = {right}
    size = 5 if rng.random() < 0.15 else 6
    while len(dates) < size:
        dates.add(_wrong(rng, right))
    options = [f"{day:%m/%d}/{day.year}" for day in rng.sample(sorted(dates), size)]
    text = f"{context} What is the date {asked} in MM/DD/YYYY?"
    return with_options(text, options, f"{right:%m/%d}/{right.year}")


def _wrong(rng: random.Random, right: date) -> date:
    """A date beside the right one, as BBH errs: by days, by weeks, by some months, or by decades."""
    way = rng.random()
    if way < 0.72:
        nearest, furthest = rng.choices(((1, 1), (2, 10), (11, 100)), (2, 2, 3))[0]
        days = rng.randint(nearest, furthest) if rng.random() < 0.7 else 7 * rng.randint(1, 4)
        return right + rng.choice((-1, 1)) * days * DAY
    if way < 0.82:
        month = rng.randint(1, 12)
        return right.replace(month=month, day=min(right.day, calendar.monthrange(right.year, month)[1]))
    year = right.year + rng.choice((-1, 1)) * rng.randint(1, 90)
    return right.replace(year=year, day=min(right.day, calendar.monthrange(year, right.month)[1]))


def _some_day(rng: random.Random) -> date:
    return date(rng.randint(1900, 2029), 1, 1) + rng.randrange(365) * DAY


def _written(rng: random.Random, day: date) -> str:
    month = MONTHS[day.month - 1]
    return rng.choice(
        (
            f"{day.month}/{day.day}/{day.year}",
            f"{day:%m/%d}/{day.year}",
            f"{month[:3]} {day.day}, {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{month} {_nth(day.day)}, {day.year}",
        )
    )


def _nth(number: int) -> str:
    ending = "th" if 10 < number < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _sentence(rng: random.Random) -> tuple[str, date]:
    sentence, days = rng.choice(list(SENTENCES.items()))
    today = _some_day(rng)
    return sentence.format(_written(rng, today + days * DAY), name=rng.choice(PEOPLE)), today


def _days_since(rng: random.Random) -> tuple[str, date]:
    start, days = _some_day(rng), rng.randint(20, 300)
    name = rng.choice(PEOPLE)
    return f"{name} opened a shop on {_written(rng, start)}. {days} days have passed since then.", start + days * DAY


def _anniversary(rng: random.Random) -> tuple[str, date]:
    wedding = _some_day(rng)
    years = rng.choice((2, 3, 5, 10, 20, 30, 40))
    one, other = rng.sample(PEOPLE, 2)
    text = f"{one} and {other} married on {_written(rng, wedding)}. It is their {years}-year anniversary today."
    if (wedding.month, wedding.day) == (2, 29):
        return _anniversary(rng)
    return text, wedding.replace(year=wedding.year + years)


def _dispute(rng: random.Random) -> tuple[str, date]:
    days = [_some_day(rng)]
    days.append(days[0] + DAY)
    (one, first), (other, second) = zip(rng.sample(PEOPLE, 2), rng.sample(days, 2), strict=True)
    name, today = rng.choice(((one, first), (other, second)))
    thinks = f"{one} thinks today is {_written(rng, first)}, but {other} thinks today is {_written(rng, second)}."
    return f"{thinks} {name} is correct.", today


def _end_of_month(rng: random.Random) -> tuple[str, date]:
    day = _some_day(rng)
    last = day.replace(day=calendar.monthrange(day.year, day.month)[1])
    return f"Today is the last day of {MONTHS[day.month - 1]} {day.year}.", last


def _holiday(rng: random.Random) -> tuple[str, date]:
    name, (month, day) = rng.choice(list(HOLIDAYS.items()))
    today = date(rng.randint(1900, 2029), month, day)
    return f"Today is {name} of {today.year}.", today


def _weekday_holiday(rng: random.Random) -> tuple[str, date]:
    name, (month, weekday, which) = rng.choice(list(WEEKDAY_HOLIDAYS.items()))
    first = date(rng.randint(1990, 2029), month, 1)
    today = first + ((weekday - first.weekday()) % 7 + 7 * (which - 1)) * DAY
    rule = f"In the US, {name} is on the {ORDINALS[which - 1]} {WEEKDAYS[weekday]} of {MONTHS[month - 1]}."
    return f"{rule} Today is the US {name} of {today.year}.", today


def _counted_day(rng: random.Random) -> tuple[str, date]:
    today = date(rng.randint(1900, 2029), rng.randint(1, 10), rng.randint(1, 10))
    day, month = ORDINALS[today.day - 1], ORDINALS[today.month - 1]
    return f"Today is the {day} day of the {month} month of {today.year}.", today


CONTEXTS: tuple[Callable[[random.Random], tuple[str, date]], ...] = (
    *[_sentence] * 7,
    *(_days_since, _anniversary, _dispute, _end_of_month, _holiday, _weekday_holiday, _counted_day),
)

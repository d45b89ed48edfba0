"""Answers BBH-like questions from their text alone, each task by another route than the one that made them."""

from __future__ import annotations

import ast
import calendar
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta
from itertools import permutations

COUNTING = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBERS = {word: number for number, word in enumerate(COUNTING.split(" "))} | {"a": 1, "an": 1}
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "last"]


def options_of(text: str) -> dict[str, str]:
    """What each option says: {"zero": "(A)", ...}."""
    return {option: letter for letter, option in re.findall(r"^(\([A-Z]\)) (.+)$", text, re.MULTILINE)}


def items(list_text: str) -> list[str]:
    return re.split(r", and |, | and ", list_text)


def find(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text, re.DOTALL)
    assert match, f"{pattern!r} is not in {text!r}"
    return match.groups()


def boolean_expressions(text: str) -> str:
    def value(node: ast.expr) -> bool:
        match node:
            case ast.BoolOp(ast.And(), values):
                return all(map(value, values))
            case ast.BoolOp(ast.Or(), values):
                return any(map(value, values))
            case ast.UnaryOp(ast.Not(), operand):
                return not value(operand)
            case ast.Constant(bool(constant)):
                return constant
        raise ValueError(ast.dump(node))

    return str(value(ast.parse(text.removesuffix(" is"), mode="eval").body))


def multistep_arithmetic_two(text: str) -> str:
    def value(node: ast.expr) -> int:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.Constant(int(constant)):
                return constant
        raise ValueError(ast.dump(node))

    return str(value(ast.parse(text.removesuffix(" ="), mode="eval").body))


def dyck_languages(text: str) -> str:
    stack: list[str] = []
    for bracket in text.split("Input: ")[1].split():
        if bracket in "([{<":
            stack.append(")]}>"["([{<".index(bracket)])
        else:
            assert bracket == stack.pop()
    return " ".join(reversed(stack))


def word_sorting(text: str) -> str:
    """By insertion, comparing letter by letter."""
    done: list[str] = []
    for word in text.split("List: ")[1].split():
        place = sum(list(map(ord, other)) < list(map(ord, word)) for other in done)
        done.insert(place, word)
    return " ".join(done)


def navigate(text: str) -> str:
    """On a grid, north up; "Always face forward" leaves the heading north and moves sideways or backward."""
    compass = [(0, 1), (1, 0), (0, -1), (-1, 0)]  # clockwise from north
    sides = {"forward": 0, "right": 1, "backward": 2, "left": 3, "around": 2, "": 0}
    x = y = heading = 0
    for turn, steps, way in re.findall(r"Turn (\w+)\.|Take (\d+) steps? ?(\w*)\.", text):
        if turn:
            heading += sides[turn]
        else:
            dx, dy = compass[(heading + sides[way]) % 4]
            x, y = x + int(steps) * dx, y + int(steps) * dy
    return "Yes" if (x, y) == (0, 0) else "No"


def web_of_lies(text: str) -> str:
    """By parity: each "lies" turns the last speaker's honesty round."""
    claims = re.findall(r"(\w+) says (\w+) (?:tells|lies)", text)
    speakers = [find(r"Question: (\w+)", text)[0], *(speaker for speaker, _ in claims)]
    assert [other for _, other in claims] == speakers[:-1], text
    assert find(r"Does (\w+) tell", text)[0] == speakers[-1], text
    return "Yes" if len(re.findall(r"\blies\b", text)) % 2 == 0 else "No"


def logical_deduction(text: str) -> str:
    """Tries every order."""
    listing, statements = find(r"each paragraph\. [^:]+: ([^.]+)\. (.+)\nOptions:", text)
    things = [re.sub(r"^an? ", "", thing) for thing in items(listing)]
    facts = [_fact(statement, things) for statement in re.findall(r"[^.]+", statements)]
    holding = [order for order in permutations(things) if all(fact(order) for fact in facts)]
    assert len(holding) == 1, f"{len(holding)} orders fit {text!r}"
    (right,) = [letter for option, letter in options_of(text).items() if _fact(option, things)(holding[0])]
    return right


def _fact(statement: str, things: list[str]) -> Callable[[tuple[str, ...]], bool]:
    """Whether an order, from left, first, newest or most expensive on, is as the statement says."""
    one, *others = re.findall(rf"\b(?:{'|'.join(things)})\b", statement)
    said = statement.replace(one, "", 1)
    if others:
        (other,) = others
        if re.search(r"left of|newer|more expensive|above", said):
            return lambda order: order.index(one) < order.index(other)
        assert re.search(r"right of|older|less expensive|below", said), statement
        return lambda order: order.index(one) > order.index(other)
    ordinals = re.findall(r"first|second|third|fourth", said)
    nth = ORDINALS.index(ordinals[0]) if ordinals else 0
    from_end = re.search(r"rightmost|oldest|cheapest|last|from the right", said)
    return lambda order: order[-1 - nth if from_end else nth] == one


def tracking_shuffled_objects(text: str) -> str:
    """Follows back from the end whose place the thing asked for had before each swap."""
    start = find(r": ([^\n]+)\.\n", text)[0]
    holders = dict(
        re.findall(r"(\w+) (?:is dancing with|gets|has an?|is playing) (.+?)(?=, and [A-Z]|, [A-Z]|$)", start)
    )
    swaps = re.findall(r"(?:First|Then|Finally), (\w+) and (\w+) ", text)
    (holder,) = find(r"At the end of [^,]+, (\w+)", text)
    for swap in reversed(swaps):
        if holder in swap:
            holder = swap[swap[0] == holder]
    return options_of(text)[holders[holder]]


def temporal_sequences(text: str) -> str:
    """Hour by hour: which hours between waking and closing saw nobody."""
    woke, closed = (_hour(hour) for hour in find(r"woke up at (\w+)\..*closed after (\w+)\.", text))
    seen = {
        hour
        for start, end in re.findall(r"saw .+ from (\w+) to (\w+)\.", text)
        for hour in range(_hour(start), _hour(end))
    }
    free = [hour for hour in range(woke, closed) if hour not in seen]
    fitting = [
        letter
        for option, letter in options_of(text).items()
        if list(range(*(_hour(hour) for hour in option.split(" to ")))) == free
    ]
    assert len(fitting) == 1
    return fitting[0]


def _hour(text: str) -> int:
    return datetime.strptime(text, "%I%p").hour


def object_counting(text: str) -> str:
    listing, asked = find(r"I have (.+)\. How many (.+) do I have", text)
    counted = [part.split(" ", 1) for part in items(listing)]
    return str(sum(NUMBERS[number] for number, thing in counted if asked == "objects" or _kind(thing) == asked))


KINDS = {  # by the stems of their words, from any list
    "vegetables": "beet|broccoli|cabbage|carrot|cauliflower|celery|garlic|leek|lettuce|onion|potato|radish|turnip|yam",
    "fruits": "apple|banana|cherr|berry|berries|grape|lemon|mango|nectarine|orange|peach|pear|plum",
    "animals": "bear|cat|chicken|cow|dog|donkey|duck|fish|frog|geese|goat|goose|horse|mice|mouse|pig|rabbit|sheep|snail"
    "|snake",
    "musical instruments": "accordion|banjo|clarinet|drum|flute|harp|oboe|piano|trombone|trumpet|tuba|violin",
    "objects": "bed|bookcase|car|chair|clock|couch|desk|fridge|lamp|microwave|mirror|oven|stove|table|toaster",
}


def _kind(thing: str) -> str:
    kinds = [kind for kind, stems in KINDS.items() if re.search(rf"\b\w*?(?:{stems})(?:s|es|ies|y)?\b", thing)]
    assert len(kinds) == 1, f"{thing!r} may be any of {kinds}"
    return kinds[0]


def reasoning_about_colored_objects(text: str) -> str:
    scene, question = find(r"^On the \w+, (.+)\. (.+\?)\n", text)
    listing = re.sub(r"^.*row: |^(?:there is|there are|I see|you see) ", "", scene)
    return options_of(text)[_about_colors(question, [part.split(" ", 2) for part in items(listing)])]


def _about_colors(question: str, parts: list[list[str]]) -> str:
    words = list(NUMBERS)
    colors = [color for _, color, _ in parts]
    if match := re.match(r"What color is the (.+)\?", question):
        return next(color for _, color, thing in parts if thing == match[1])
    if match := re.match(r"Is the (.+) (\w+)\?", question):
        return "yes" if [match[2], match[1]] in [part[1:] for part in parts] else "no"
    if match := re.match(r"How many \w+ are neither (\w+) nor (\w+)\?", question):
        return words[len([color for color in colors if color not in match.groups()])]
    if match := re.match(r"If I remove all the (.+) from the \w+, how many (.+) remain on it\?", question):
        return words[_remaining(match[1], match[2], parts)]
    if match := re.match(r"What is the color of the (left|right)-most", question):
        return colors[0 if match[1] == "left" else -1]

    place = next(
        index
        for index, (_, color, thing) in enumerate(parts)
        if re.search(rf"the (?:{thing}|{color} (?:thing|item|object))\?$", question)
    )
    if match := re.match(r"What is the color of the \w+ directly to the (left|right)", question):
        return colors[place - 1 if match[1] == "left" else place + 1]
    if match := re.match(r"How many non-(\w+) \w+ do you see to the (left|right)", question):
        side = colors[:place] if match[2] == "left" else colors[place + 1 :]
        return words[len([color for color in side if color != match[1]])]
    assert "furthest from" in question
    distances = [abs(index - place) for index in range(len(colors))]
    assert distances.count(max(distances)) == 1
    return colors[distances.index(max(distances))]


def _remaining(taken: str, asked: str, parts: list[list[str]]) -> int:
    def among(color: str, thing: str, what: str) -> bool:
        by_color = re.fullmatch(rf"{color} (?:things|items|objects)", what)
        return by_color is not None or _singular(thing) == _singular(what)

    return sum(NUMBERS[n] for n, *part in parts if among(*part, asked) and not among(*part, taken))


def _singular(things: str) -> str:
    head, *rest = things.split(" of ")
    for plural, one in (("scarves", "scarf"), ("shes", "sh"), ("s", "")):
        if head.endswith(plural):
            head = head.removesuffix(plural) + one
            break
    return " of ".join([head, *rest])


# --- dates ---

DAY = timedelta(days=1)
WRITTEN = r"(\d{1,2}/\d{1,2}/\d{4}|[A-Z][a-z]+\.? \d{1,2}(?:st|nd|rd|th)?,? \d{4})"
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
HOLIDAYS = {"Christmas Eve": (12, 24), "Christmas Day": (12, 25), "New Year's Eve": (12, 31), "Halloween": (10, 31)}


def read_date(text: str) -> date:
    if "/" in text:
        month, day, year = map(int, text.split("/"))
    else:
        name, day, year = (int(part) if part.isdigit() else part for part in re.findall(r"[A-Za-z]{3,}|\d+", text))
        month = month_number(name)
    return date(year, month, day)


def month_number(name: str) -> int:
    return MONTHS.index(name[:3].lower()) + 1


def later(day: date, months: int) -> date:
    """Whole months on; the last day of a month too short for the day."""
    years, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(years, month + 1, min(day.day, calendar.monthrange(years, month + 1)[1]))


def last_of(year: str, month: str) -> date:
    return later(date(int(year), month_number(month), 1), 1) - DAY


def nth_weekday(nth: str, weekday: str, month: str, year: str) -> date:
    days = [date(int(year), month_number(month), 1) + n * DAY for n in range(31)]
    return [day for day in days if day.isoweekday() == WEEKDAYS.index(weekday) + 1][ORDINALS.index(nth)]


def palindrome(year: str) -> date:
    days = [date(int(year), 1, 1) + n * DAY for n in range(365)]
    return next(day for day in days if f"{day:%m%d%Y}" == f"{day:%m%d%Y}"[::-1])


def on(day: str, days: int) -> date:
    return read_date(day) + days * DAY


# How a context tells today, the first pattern that fits; its groups go to the function. DATE stands for a date.
TODAY: list[tuple[str, Callable[..., date]]] = [
    (r"(\d{4}) is coming in (\d+) hours", lambda year, h: (datetime(int(year), 1, 1) - timedelta(hours=int(h))).date()),
    (r"day before the month .* today is (\d+)/(\d+)/(\d+)", lambda d, m, y: date(int(y), int(m), int(d))),
    (r"is on the (\w+) (\w+day) of (\w+)\. Today is the US .+ of (\d{4})\.", nth_weekday),
    (r"today is the (\w+) (\w+day) of (\d{4})", lambda nth, weekday, year: nth_weekday(nth, weekday, "Jan", year)),
    (r"(\w+) thinks today is DATE, .*\. \1 is correct", lambda _, day: on(day, 0)),
    (r"but (\w+) thinks today is DATE\. \1 is correct", lambda _, day: on(day, 0)),
    (r"thought today is DATE, but .* which is (\d+) day later", lambda day, days: on(day, int(days))),
    (r"married on DATE\. .* (\d+)-year anniversary", lambda day, years: later(read_date(day), 12 * int(years))),
    (r"married on DATE\. .* golden", lambda day: later(read_date(day), 12 * 50)),
    (
        r"in (\d{4})\. Today is her (\d+)-year work anniversary\. .* on (\w+ \d+), her second day",
        lambda year, years, second: later(on(f"{second}, {year}", -1), 12 * int(years)),
    ),
    (r"tomorrow,? \(?(?:\w+, )?DATE", lambda day: on(day, -1)),
    (
        r"born on the last day of (\w+) in (\d{4})\. .* (\d+)-year-old birthday",
        lambda month, year, years: later(last_of(year, month), 12 * int(years)),
    ),
    (r"on DATE\. (\d+) days have passed since then", lambda day, days: on(day, int(days))),
    (r"On DATE \w+ bought (\d+) eggs", lambda day, days: on(day, int(days))),
    (
        r"on the (\d+)th of each month starting from the (\w+) of (\d{4})\. It is her (\d+)th visit",
        lambda day, month, year, nth: later(read_date(f"{month} {day}, {year}"), int(nth) - 1),
    ),
    (r"DATE is like yesterday .* ten years ago", lambda day: later(read_date(day), 12 * 10)),
    (r"DATE as if it were yesterday, but that is actually (\d+) days ago", lambda day, days: on(day, int(days))),
    (r"on DATE, but was delayed by one day to today", lambda day: on(day, 1)),
    (r"on DATE, but was delayed by two days to today", lambda day: on(day, 2)),
    (r"DATE, which is (\d+) days away from now", lambda day, days: on(day, -int(days))),
    (r"Today is (\d+/\d+)[,.] .*?(\d{4})", lambda day, year: read_date(f"{day}/{year}")),
    (r"Today is (" + "|".join(HOLIDAYS) + r") of (\d{4})", lambda name, year: date(int(year), *HOLIDAYS[name])),
    (r"palindrome day of (\d{4})", palindrome),
    (
        r"the (\w+) day of the (\w+) month of (\d{4})",
        lambda day, month, year: date(int(year), ORDINALS.index(month) + 1, ORDINALS.index(day) + 1),
    ),
    (r"last day of the first quarter of (\d{4})", lambda year: last_of(year, "March")),
    (r"last day of ([A-Z]\w+) (\d{4})", lambda month, year: last_of(year, month)),
    (r"last day of (\d{4})", lambda year: last_of(year, "December")),
    (r"Today is the first day of (\d{4})", lambda year: date(int(year), 1, 1)),
    (r"DATE a week ago", lambda day: on(day, 7)),
    (r"DATE in a week", lambda day: on(day, -7)),
    (r"day before yesterday was DATE", lambda day: on(day, 2)),
    (r"day after tomorrow is DATE", lambda day: on(day, -2)),
    (r"Yesterday(?: was|,) DATE", lambda day: on(day, 1)),
    (r"Tomorrow is DATE", lambda day: on(day, -1)),
    (r"(?:Today is|It is|Today,|pm o[fn]) DATE", lambda day: on(day, 0)),
]

ASKED: dict[str, Callable[[date], date]] = {
    "today": lambda today: today,
    "tomorrow": lambda today: today + DAY,
    "24 hours later": lambda today: today + DAY,
    "yesterday": lambda today: today - DAY,
    "10 days ago": lambda today: today - 10 * DAY,
    "one week ago from today": lambda today: today - 7 * DAY,
    "one week from today": lambda today: today + 7 * DAY,
    "a month ago": lambda today: later(today, -1),
    "one year ago from today": lambda today: later(today, -12),
}


def date_understanding(text: str) -> str:
    """The option's letter, or the date itself where no option says it."""
    context, asked = find(r"^(.*) What is the date (.+) in MM/DD/YYYY\?", text)
    for pattern, function in TODAY:
        if match := re.search(pattern.replace("DATE", WRITTEN), context):
            answer = ASKED[asked](function(*match.groups())).strftime("%m/%d/%Y")
            return options_of(text).get(answer, answer)
    raise ValueError(context)


SOLVERS: dict[str, Callable[[str], str]] = {
    "boolean_expressions": boolean_expressions,
    "date_understanding": date_understanding,
    "dyck_languages": dyck_languages,
    "logical_deduction_five_objects": logical_deduction,
    "logical_deduction_seven_objects": logical_deduction,
    "logical_deduction_three_objects": logical_deduction,
    "multistep_arithmetic_two": multistep_arithmetic_two,
    "navigate": navigate,
    "object_counting": object_counting,
    "reasoning_about_colored_objects": reasoning_about_colored_objects,
    "temporal_sequences": temporal_sequences,
    "tracking_shuffled_objects_five_objects": tracking_shuffled_objects,
    "tracking_shuffled_objects_seven_objects": tracking_shuffled_objects,
    "tracking_shuffled_objects_three_objects": tracking_shuffled_objects,
    "web_of_lies": web_of_lies,
    "word_sorting": word_sorting,
}

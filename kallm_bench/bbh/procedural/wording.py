"""How BBH words things: lists, articles, counts, option letters."""

from __future__ import annotations

from collections.abc import Sequence

COUNTS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def a(noun: str) -> str:
    """The noun with its article: "a bed", "an oven"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(parts: Sequence[str]) -> str:
    """ "one", "one and two", or "one, two, and three"."""
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def with_options(question: str, options: Sequence[str], right: str) -> tuple[str, str]:
    """The question with its lettered options below, and the letter of the right one, "(B)"."""
    lines = (f"\n({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\nOptions:{''.join(lines)}", f"({LETTERS[options.index(right)]})"

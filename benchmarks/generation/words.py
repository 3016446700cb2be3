# SPDX-License-Identifier: Apache-2.0
"""Words, names and filler sentences, drawn by a generator; nothing here is in any book."""

from __future__ import annotations

import random

COLOURS = [
    "amber", "black", "blue", "brown", "gold", "green", "grey", "olive", "orange", "pink", "purple", "red",
    "silver", "white", "yellow",
]  # fmt: skip
ANIMALS = [
    "bear", "bird", "cat", "cow", "deer", "dog", "duck", "fish", "fox", "frog", "goat", "horse", "lion", "mouse",
    "owl", "pig", "rabbit", "sheep", "wolf",
]  # fmt: skip
THINGS = [
    "apple", "ball", "bell", "boat", "book", "box", "bread", "chair", "clock", "coat", "cup", "door", "hat", "key",
    "lamp", "map", "ring", "shoe", "table", "tree",
]  # fmt: skip
PLACES = [
    "bridge", "castle", "church", "farm", "forest", "garden", "harbour", "hill", "lake", "market", "mill", "museum",
    "river", "school", "tower",
]  # fmt: skip
VERBS = [
    "carried", "dropped", "found", "hid", "kept", "left", "lost", "painted", "saw", "sold", "took", "watched",
]  # fmt: skip
WORDS = [*COLOURS, *ANIMALS, *THINGS, *PLACES]


def number(draw: random.Random, digits: int = 4) -> str:
    """Return a number of so many digits that does not begin with 0."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def names(draw: random.Random, count: int) -> list[str]:
    """Return different names of the form "colour animal"."""
    return draw.sample([f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS], count)


def sentence(draw: random.Random) -> str:
    """Return one sentence of filler, about 15 tokens, with no number in it."""
    colour, animal, verb, other, thing, place = map(draw.choice, (COLOURS, ANIMALS, VERBS, COLOURS, THINGS, PLACES))
    return f" The {colour} {animal} {verb} a {other} {thing} near the {place}."

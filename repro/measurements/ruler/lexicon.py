"""Build the words, numbers and prose of the RULER tasks, with training and evaluation kept apart.

Everything a question can ask for (keys, values, coded words, entities) is drawn from vocabularies
that a hash splits in two halves: what a model saw in training can never be an evaluation answer.
"""

# ruff: noqa: SIM905 - long lists of words read better as text

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Literal

Split = Literal["train", "evaluation"]

# Every syllable ends in a letter that no hexadecimal number has, so words and codes never mix.
_SYLLABLES = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "klmnrst"]
FIRST_SYLLABLES = tuple(_SYLLABLES[0::5][:96] + _SYLLABLES[2::5][:96])
LAST_SYLLABLES = tuple(_SYLLABLES[1::5][:96] + _SYLLABLES[3::5][:96])

NOUNS = (
    "lamp road river garden window table harbour mountain forest village bridge kettle mirror "
    "pocket blanket candle ladder basket engine signal meadow island tower carpet pillow needle "
    "hammer barrel saddle lantern orchard chimney cellar compass anchor sail rudder shelter "
    "fountain corridor gallery workshop stable quarry valley shore cliff pasture hedge path "
    "cottage kitchen drawer ribbon button thread wagon wheel paddle pebble"
).split()
ADJECTIVES = (
    "warm long calm quiet narrow wooden silver broken hollow gentle heavy bright small simple "
    "modern yellow green purple crooked polished dusty frozen gleaming humble lazy jolly lonely "
    "mellow nimble patient rustic sturdy tender proud vivid weary young distant bare tidy"
).split()
VERBS = (
    "follows reaches touches crosses watches covers hides holds meets joins guards leaves finds "
    "passes turns lifts paints mends carries moves opens closes borrows counts draws gathers "
    "keeps likes measures notices"
).split()
PREPOSITIONS = "near behind under above beside beyond along inside outside past".split()
ADVERBS = "slowly often rarely quietly gladly always never sometimes today again".split()
RELATIONS = (
    "mayor river market school library harbour museum theatre station temple painter poet singer "
    "baker doctor lawyer captain teacher garden festival castle factory hospital college"
).split()

# Words of the prompts and of the prose, which no made-up word may spell.
RESERVED = frozenset({"number", *NOUNS, *ADJECTIVES, *VERBS, *PREPOSITIONS, *ADVERBS, *RELATIONS})

# The constant text between the needles of the tasks that use a repeated haystack.
REPEATED = (
    "The lamp is warm.",
    "The road is long.",
    "The river is calm.",
    "On we walk.",
    "Home and out again.",
)


def in_split(text: str, split: Split) -> bool:
    """Return whether ``text`` belongs to the half of its vocabulary that ``split`` may use."""
    half = hashlib.sha256(text.encode()).digest()[0] & 1
    return half == (0 if split == "train" else 1)


class Source:
    """Draw distinct words, numbers and codes of one split from a seeded generator."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split: Split = split
        self._seen: set[str] = set(RESERVED)

    def word(self) -> str:
        """Return a new two-syllable word such as ``"bornak"``."""
        return self._new(lambda: self.rng.choice(FIRST_SYLLABLES) + self.rng.choice(LAST_SYLLABLES))

    def words(self, count: int) -> list[str]:
        """Return ``count`` distinct new words."""
        return [self.word() for _ in range(count)]

    def number(self, digits: int = 7) -> str:
        """Return a new number of ``digits`` digits, as text."""
        return self._new(lambda: str(self.rng.randrange(10 ** (digits - 1), 10**digits)))

    def code(self) -> str:
        """Return a new random 128-bit code, written like a UUID."""
        return self._new(lambda: _dashed(f"{self.rng.getrandbits(128):032x}"))

    def _new(self, draw: Callable[[], str]) -> str:
        while True:
            text = draw()
            if text not in self._seen and in_split(text, self.split):
                self._seen.add(text)
                return text


def _dashed(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def prose(rng: random.Random) -> Iterator[str]:
    """Yield sentences without end; a paragraph keeps to a few nouns, so text predicts text."""
    while True:
        nouns = rng.sample(NOUNS, 8)
        adjectives = rng.sample(ADJECTIVES, 6)
        verbs = rng.sample(VERBS, 5)
        for _ in range(rng.randint(6, 12)):
            yield _sentence(rng, nouns, adjectives, verbs)


def _sentence(rng: random.Random, nouns: list[str], adjectives: list[str], verbs: list[str]) -> str:
    subject, target, place = rng.sample(nouns, 3)
    form = rng.randrange(6)
    if form == 0:
        return f"The {rng.choice(adjectives)} {subject} {rng.choice(verbs)} the {target}."
    if form == 1:
        return f"A {subject} {rng.choice(PREPOSITIONS)} the {place} is {rng.choice(adjectives)}."
    if form == 2:
        return f"We {rng.choice(ADVERBS)} walk {rng.choice(PREPOSITIONS)} the {place}."
    if form == 3:
        return (
            f"When the {subject} {rng.choice(verbs)} the {target}, "
            f"the {place} is {rng.choice(adjectives)}."
        )
    if form == 4:
        return (
            f"The {subject} {rng.choice(PREPOSITIONS)} the {place} "
            f"{rng.choice(ADVERBS)} {rng.choice(verbs)} a {rng.choice(adjectives)} {target}."
        )
    one, two = rng.sample(adjectives, 2)
    return f"It is {one} and {two} {rng.choice(PREPOSITIONS)} the {place}."

"""The word lists of the embedded world and the facts of its knowledge base; everything here is fixed by `SEED`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

SEED = 7

NOUNS = (
    "dog cat sun map cup pen hat box bus car key bed egg fan jar lamp leaf milk moon nest rope salt ship shoe soap star tree wolf bear "
    "bird boat book cake coin corn desk door drum duck fish flag frog gate goat hand harp horn kite lion mask nail oven pear ring rock "
    "rose seed sock tent wind"
).split()
LETTERS = list("bcdfghklmnprstvz")
NAMES = "Tom Ann Sam Eva Ben Lia Max Zoe Ida Leo Mia Nik".split()
THINGS = "apples coins books cards nuts pens eggs cups stamps shells".split()

DISEASES = "fever cough gout rash flu asthma migraine anemia malaria measles cramp colic".split()
ORGANS = "liver heart lung skin kidney brain".split()
PLANTS = "fern moss ivy sage mint clover nettle thistle".split()
COLORS = "red blue green white black yellow pink gray".split()
EFFECTS = "sleep thirst hunger sweat itch chills".split()

TIERS = {"common": 48, "medium": 24, "rare": 24}
"""How many drugs the pre-training corpus names often, sometimes and seldom."""

RELATIONS = {"treats": DISEASES, "plant": PLANTS, "color": COLORS, "effect": EFFECTS}
"""Relations of a drug and the values each may take."""


@dataclass(frozen=True)
class Drug:
    """One entity of the knowledge base; `facts` maps each of `RELATIONS` to its value."""

    name: str
    tier: str
    facts: dict[str, str]


def drug_names(rng: Random, count: int) -> list[str]:
    """`count` distinct names that sound like drugs."""
    starts, ends = "ba co di fe gu la mi no pa ru sa to ve zu ki".split(), "lan mol nex pril rin sol tan vir zac".split()
    middles = "do la mi ne ro si ta vu".split()
    names = sorted(a + b + c for a in starts for b in middles for c in ends)
    return rng.sample(names, count)


@cache
def drugs() -> tuple[Drug, ...]:
    """All drugs, common ones first."""
    rng = Random(SEED)
    tiers = [tier for tier, count in TIERS.items() for _ in range(count)]
    names = drug_names(rng, len(tiers))
    return tuple(
        Drug(name, tier, {relation: rng.choice(values) for relation, values in RELATIONS.items()})
        for name, tier in zip(names, tiers, strict=True)
    )


@cache
def organ_of() -> dict[str, str]:
    """The organ each disease affects."""
    rng = Random(SEED + 1)
    organs = ORGANS * (len(DISEASES) // len(ORGANS))
    rng.shuffle(organs)
    return dict(zip(DISEASES, organs, strict=True))

"""The instruct set: every general skill in one plain style, refusals included; long word problems and most facts are left out."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from guidetune.artefacts import derive_seed
from guidetune.world.corpus import BY_NAME, some_story
from guidetune.world.generators.arithmetic import plain_solution
from guidetune.world.items import draw

STORY_LENGTHS = {1: 2.0, 2: 4.0, 3: 1.0}
STORY_SHARE = 0.12


def conversations(seed: int = 0, start: int = 0) -> Iterator[list[dict[str, str]]]:
    """The endless instruct set from conversation `start` on; conversation i depends only on (seed, i)."""
    names = [name for name in BY_NAME if name != "story"]
    index = start
    while True:
        rng = Random(derive_seed(seed, "world", "instruct", index))
        if rng.random() < STORY_SHARE:
            story = some_story(rng, STORY_LENGTHS)
            prompt, answer = story.text, plain_solution(story)
        else:
            problem = draw(BY_NAME[rng.choice(names)], rng, "train")
            prompt, answer = problem.prompt, problem.answer
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield [{"role": "system", "content": "You are a helpful assistant."}, *messages] if rng.random() < 0.03 else messages
        index += 1

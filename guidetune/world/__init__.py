"""The embedded world: seeded task generators, a tokenizer, and a small base/instruct pair trained on them.

>>> from guidetune import world
>>> item = world.items("arithmetic", "test", 1)[0]
>>> world.grade(item, item.answer)
True
"""

from guidetune.world.export import describe, export, export_rows, items, path, row, rows_file, sets
from guidetune.world.grade import grade
from guidetune.world.items import Item

__all__ = ["Item", "build", "describe", "export", "export_rows", "grade", "items", "path", "row", "rows_file", "sets"]


def __getattr__(name: str) -> object:
    # `build` needs torch; it is loaded when asked for.
    if name == "build":
        from guidetune.world.build import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""`python -m guidetune` is the `guidetune` command."""

from __future__ import annotations

import sys

from guidetune.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Guidance: a teacher's log-probability of every supervised target token, computed once and kept on disk."""

from __future__ import annotations

from guidetune.guidance.store import Guidance, export
from guidetune.guidance.teach import GuideSettings, teach

__all__ = ["Guidance", "GuideSettings", "export", "teach"]

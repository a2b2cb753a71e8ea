"""Seeded generators of the embedded world, one file per family; each holds `SKILLS`, a tuple of `Skill`."""

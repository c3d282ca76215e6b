"""The kind ``lowrank``: a sum of outer products of vectors (spec/deltafmt-v1.md, section 13)."""

"""The kind ``lowbit``: a code for every element (spec/deltafmt-v1.md, section 12)."""

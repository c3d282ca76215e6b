"""The kind ``nm``: N of every M columns are kept (spec/deltafmt-v1.md, section 11)."""

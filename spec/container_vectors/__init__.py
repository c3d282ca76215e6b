"""The vectors of sections 3 to 10 of the specification: one file a section, found by its name."""

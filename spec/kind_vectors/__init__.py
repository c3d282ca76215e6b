"""The vectors of each kind of term, and its made-up content: one file a kind, found by its name."""

"""Exact tensors: every bit of a fine-tuned tensor, coded relative to the base's (spec/deltafmt-v1.md, section 17)."""

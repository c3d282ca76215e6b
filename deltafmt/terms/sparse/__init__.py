"""The kind ``sparse``: entries that stand anywhere (spec/deltafmt-v1.md, section 14)."""

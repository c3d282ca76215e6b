"""Formats of other programs for what has changed between two versions of a model's weights.

``docs/how-to/convert.md`` says which programs write them, and from which of their sources each rule here was learnt. A
file of such a format is a file from a stranger: every number in it is checked before it is used.
"""

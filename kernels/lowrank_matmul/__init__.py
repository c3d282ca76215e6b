"""Packed ``lowrank`` terms, decoded by torch."""

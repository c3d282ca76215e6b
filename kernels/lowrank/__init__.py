"""Products with packed ``lowrank`` terms."""

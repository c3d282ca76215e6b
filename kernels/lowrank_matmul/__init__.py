"""Products with packed ``lowrank`` terms; the reference alone so far."""

"""Products with packed ``lowbit`` terms; the reference alone so far."""

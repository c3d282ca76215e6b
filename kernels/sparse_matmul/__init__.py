"""Products with packed ``sparse`` terms; the reference alone so far."""

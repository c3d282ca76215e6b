"""Products with packed ``sparse`` terms."""

"""Products with packed ``lowbit`` terms."""

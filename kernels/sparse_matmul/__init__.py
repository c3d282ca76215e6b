"""Packed ``sparse`` terms, decoded by torch."""

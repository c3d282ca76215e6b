"""Models that serve deltas: ``deltafmt.transformers.attach(model, {"math": "math.deltafmt"})``."""

"""``y += x @ delta.T`` from the packed words of an ``nm`` term."""

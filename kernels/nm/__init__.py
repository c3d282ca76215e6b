"""``y += x @ delta.T`` from the packed words of ``nm`` terms, for the tokens of many deltas at once."""

"""Compression methods: dense deltas to arrays of positions, codes and scales. One file a method."""

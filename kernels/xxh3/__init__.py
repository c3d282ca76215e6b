"""XXH3-128 of sections that already lie on a device (spec, section 5.3)."""

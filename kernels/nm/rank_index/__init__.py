"""``rank`` indexes made ``fixed`` on the device that multiplies with them (spec, section 11.4)."""

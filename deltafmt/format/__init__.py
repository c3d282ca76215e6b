"""Constants of the format and checks of plain values; no bytes are read or written here."""

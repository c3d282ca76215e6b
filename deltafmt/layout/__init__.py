"""The specification's constants and typed structures; no bytes are read or written here."""

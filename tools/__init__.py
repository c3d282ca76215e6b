"""The command line, one file a command; shipped as ``deltafmt.tools``."""

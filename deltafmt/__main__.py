"""``python -m deltafmt``: the command line."""

from deltafmt.tools.main import main

if __name__ == "__main__":
    raise SystemExit(main())

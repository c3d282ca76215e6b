"""Builds what ``pyproject.toml`` declares; with ``DELTAFMT_PURE=1``, without the compiled loops.

The extension is optional: where no compiler is found, the package installs without it and the numpy reference runs.
"""

import os
import sys

from setuptools import Distribution, setup


class PureDistribution(Distribution):
    """The package without its extension, for a wheel that any machine can install."""

    def parse_config_files(self, *arguments, **options):
        """Read the configuration, and leave the extension out."""
        super().parse_config_files(*arguments, **options)
        self.ext_modules = []


pure = os.environ.get("DELTAFMT_PURE") == "1" or sys.byteorder == "big"
setup(distclass=PureDistribution if pure else Distribution)

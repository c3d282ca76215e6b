"""GPU kernels that multiply on packed layouts, each beside an obvious reference; shipped as ``deltafmt.kernels``."""

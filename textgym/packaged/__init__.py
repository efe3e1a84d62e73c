"""Models that come as packages from PyPI, for machines that reach no model hub."""

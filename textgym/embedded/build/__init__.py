"""Builds the embedded models from real data: ``python -m textgym.embedded.build`` (see ``__main__``)."""

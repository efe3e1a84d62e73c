"""Rewards by rules, word lists and comparison with references: no model is needed."""

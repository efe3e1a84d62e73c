"""Rewards that learn while a policy is trained."""

"""Rewards from elsewhere: a person, a server."""

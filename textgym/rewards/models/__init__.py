"""Rewards by neural networks, and the forwards that they share."""

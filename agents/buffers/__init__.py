"""What agents learn from: the segments of a rollout, and a replay of episodes."""

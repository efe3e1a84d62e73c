"""What agents share: rollouts, losses, advantages, their environment, and how they are saved."""

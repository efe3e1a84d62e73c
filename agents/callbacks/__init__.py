"""What goes on beside training: checkpoints, a KL that is held, an early end, rewards that learn."""

"""What a training step would take under each scheme, and which scheme to choose for it."""

"""What the gradients of different workers, layers and steps have in common, and what a codec could save by it."""

"""Analysis of what gradients of different workers, layers and steps have in common, and a codec could save by it."""

"""What goes between the ranks: collectives, their bytes, and what must be the same on all."""

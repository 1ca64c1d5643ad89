"""Ranks on this machine, and a network between them; knows nothing of what they run."""

"""Ranks on this machine, and networks between them."""

"""`lgc plan`."""

"""The command line and what it does: training on recipes, comparing, reporting, planning."""

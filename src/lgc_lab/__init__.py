"""Application: training on recipes, comparing, reporting, planning, measuring."""

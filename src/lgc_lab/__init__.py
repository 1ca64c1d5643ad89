"""The application: training on recipes, comparing, reporting, planning, measuring."""

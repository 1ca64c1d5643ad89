"""Measuring what a step costs under every scheme on links of several speeds; docs/links.md has the conventions."""

"""Frameworks: one file for each, which imports it. `lgc` itself imports none of them."""

"""Measurements that need no training run."""

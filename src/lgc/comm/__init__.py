"""Communication between the ranks: collectives, their bytes, and replicas."""

"""Pruning: what depends on what in each family, what is least missed, cutting it out, masks, and recovery."""

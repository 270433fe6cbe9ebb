"""Drivers above the river: they propose recipes, send the model down it, look at what came out, propose again."""

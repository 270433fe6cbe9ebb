"""Drivers above the river: they propose recipes, send the model down the river, look at what came out, propose again."""

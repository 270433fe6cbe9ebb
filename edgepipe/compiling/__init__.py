"""Parts of the stage `compile` that are longer than a stage should be: checks, and one file per engine that links."""

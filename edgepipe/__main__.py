"""Let `python -m edgepipe` be the command."""

from edgepipe.cli import main

main(prog_name="edgepipe")

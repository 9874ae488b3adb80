"""`python -m rlhf` is the console command."""

from rlhf.run import cli

cli()

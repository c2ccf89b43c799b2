"""The commands: `python -m recnb.cli.train`, `python -m recnb.cli.notebook`, `python -m recnb.cli.sweep`."""

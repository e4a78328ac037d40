"""`python -m polyhead` is the `polyhead` command."""

from polyhead.cli import app

app(prog_name="polyhead")

"""``python -m escort`` is the command line."""

from escort.cli import app

app(prog_name="escort")

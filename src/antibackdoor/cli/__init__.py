"""The command line: thin, and slow to import nothing before a command needs it.

`frame` is what every command runs within, `options` what several of them take; each other module is a command or two.
"""

from __future__ import annotations

from antibackdoor.cli import about, bench, demo, folders, poison, predict, review, scan, train
from antibackdoor.cli.frame import DEBUG, Group, Terminated, app, end_orderly, main

COMMANDS = (train, scan, review, predict, folders, demo, poison, bench, about)
"""Where they are; importing them is what makes them known."""

__all__ = ["COMMANDS", "DEBUG", "Group", "Terminated", "app", "end_orderly", "main"]

"""Management commands, run by `openpalm feedback manage NAME`."""

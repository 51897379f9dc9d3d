"""The commands: arguments in, exit code out; the work is done elsewhere."""

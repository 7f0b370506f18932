"""The commands of `pro2sam-fast`, one module each: `HELP` (a line), `parser()` and `run(arguments) -> exit status`."""

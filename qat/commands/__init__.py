"""Subcommands of `qat`, one file each: `add(parser)` names the arguments, `run(args)` does the work and prints.

To add one: a file here and its name in `qat.cli.COMMANDS`. Heavy imports belong inside `run`, so that --help is quick.
"""

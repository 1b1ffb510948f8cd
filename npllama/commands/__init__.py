"""What each command of the command line does: one module for each, with ``run(options) -> exit code``."""

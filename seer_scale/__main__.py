"""`python -m seer_scale COMMAND ...`: the console script, for launchers that take a module."""

from seer_scale.commands.run import main

if __name__ == "__main__":  # processes that are spawned import this file too
    main()

"""`python -m peftune`: the command line, where the installed script is not on the search path."""

from peftune.cli import run

if __name__ == "__main__":
    run()

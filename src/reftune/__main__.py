"""`python -m reftune` is the command `reftune`."""

from reftune.cli.main import run

if __name__ == "__main__":
    run()

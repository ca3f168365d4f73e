"""`python -m lawnwatch STEP …` is the same program as `lawnwatch STEP …`."""

from lawnwatch.cli import program

if __name__ == "__main__":
    program()

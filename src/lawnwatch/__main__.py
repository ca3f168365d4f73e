"""`python -m lawnwatch STEP …` is the same program as `lawnwatch STEP …`."""

from lawnwatch.cli import main

if __name__ == "__main__":
    main()

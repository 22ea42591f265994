"""`python -m fastdiff`."""

from fastdiff.cli import main

if __name__ == "__main__":
    main()

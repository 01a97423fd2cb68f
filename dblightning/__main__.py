"""The command line, as ``python -m dblightning``."""

from dblightning.cli import main

if __name__ == "__main__":
    main()

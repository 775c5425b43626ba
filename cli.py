"""`python cli.py ...` in a checkout does what the installed command `sparsify ...` does."""

from sparsify.cli import main

if __name__ == "__main__":
    main()

"""`python cli.py ...` in a checkout does what the installed command `sparsify ...` does."""

from sparsify.cli.app import main

if __name__ == "__main__":
    main()

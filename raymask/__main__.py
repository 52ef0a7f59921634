"""Entry point of `python -m raymask`, for machines that have the code without the installed command."""

from raymask.cli import main

if __name__ == "__main__":
    main()

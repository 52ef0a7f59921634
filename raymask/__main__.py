"""`python -m raymask` is `raymask`: for machines where only the code is."""

from raymask.cli import main

if __name__ == "__main__":
    main()

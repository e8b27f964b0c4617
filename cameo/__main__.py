"""`python -m cameo` is the command `cameo`."""

from cameo.commands.main import main

if __name__ == "__main__":
    main()

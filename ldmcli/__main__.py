"""`python -m ldmcli` is `ldm`."""

from ldmcli.cli import main

if __name__ == "__main__":
    main()

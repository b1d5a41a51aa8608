"""`python -m mtkd` is the `mtkd` command: what the DeepSpeed launcher starts on every rank."""

from mtkd.cli.app import main

if __name__ == "__main__":
    main()

"""The command line as `python -m elip_models`."""

from elip_models.cli import main

if __name__ == "__main__":
    main()

"""The command `python -m elip_models.open_clip_train`, see `integrations/open_clip.py`."""

import sys

from elip_models.integrations.open_clip import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

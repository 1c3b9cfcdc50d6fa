"""Find what a reduction costs on the user's own task, images and machine.

`task.py` says what a task is; one file a task. `choice.py` chooses a setting on one part of the
images and measures it on the other. `report.py` writes the result.
"""

from elip_models.validation import require_packages

require_packages("elip_models.calibration", "PIL")

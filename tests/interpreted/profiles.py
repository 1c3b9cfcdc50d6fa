"""Number of cases that `test_randomised.py` draws: a few by default, many in the profile "full".

This is a plugin, so that the profile exists when the option is read:

    TRITON_INTERPRET=1 python -m pytest -p tests.interpreted.profiles --hypothesis-profile full \
        --hypothesis-show-statistics tests/interpreted/test_randomised.py
"""

from hypothesis import settings

settings.register_profile("sample", max_examples=2, derandomize=True, deadline=None, database=None)
settings.register_profile("full", settings.get_profile("sample"), max_examples=100)
settings.load_profile("sample")

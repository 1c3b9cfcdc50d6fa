"""How the cases of a test are thinned."""

from itertools import product

import pytest

from tests.helpers.tiers import tiered


def test_each_value_of_each_argument_is_in_one_of_few_cases():
    models, dtypes, flags = [f"model {i}" for i in range(5)], ("fp32", "bf16"), (True, False)
    params = tiered(product(models, dtypes, flags), [("model 3", "fp32", True)])
    cases = [param.values for param in params]
    assert [set(values) for values in zip(*cases, strict=True)] == [{*models}, {*dtypes}, {*flags}]
    assert len(cases) == len(models) and cases[0] == ("model 3", "fp32", True)
    assert [bool(param.marks) for param in params] == [False, True, True, True, True]


def test_a_quick_case_that_is_none_of_the_cases_is_an_error():
    with pytest.raises(AssertionError, match="expected some of the cases, got"):
        tiered(["elip", "tome"], ["evit"])

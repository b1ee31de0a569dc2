"""The exit status of every error, as the documentation promises it."""

import pytest

from autocomp.core import errors


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SpecError", 2),
        ("DataError", 2),
        ("ModelError", 2),
        ("StudyError", 2),
        ("UserError", 2),
        ("InfeasibleError", 3),
        ("InternalError", 4),
        ("StorageError", 4),
    ],
)
def test_exit_status(name, status):
    error = getattr(errors, name)("text")
    assert isinstance(error, errors.AutocompError)
    assert error.exit_status == status
    assert isinstance(error, errors.UserError) == (status == 2)
    assert name in (errors.__doc__ or "")

"""An operator may lower the bounds of uploaded files, and not raise them: what is above was tried by nobody."""

from __future__ import annotations

import pytest

from capo.cli.serve import read_settings
from registry.errors import InvalidRequestError
from tune.jobs.limits import MAX_FILE_BYTES, MAX_FILE_ROWS


@pytest.mark.parametrize(("name", "most"), [("max_file_bytes", MAX_FILE_BYTES), ("max_file_rows", MAX_FILE_ROWS)])
def test_a_bound_may_be_lowered_and_not_raised(name: str, most: int) -> None:
    assert getattr(read_settings(), name) == most
    assert getattr(read_settings(**{name: most // 2}), name) == most // 2
    with pytest.raises(InvalidRequestError, match=name):
        read_settings(**{name: most + 1})

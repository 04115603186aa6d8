"""The kernels, interpreted: every check of `device/` at small sizes, on any machine."""

import pytest

from tests.kernels import checks

pytest.importorskip("triton", reason="kernels are Triton's; it is for Linux")


@pytest.mark.parametrize("name", checks.NAMES)
def test_interpreted(name):
    code, output = checks.run(name, interpreted=True)
    assert code == 0, output

"""The kernels on a GPU: every check of `device/` at full size."""

import pytest
import torch

from tests.kernels import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", checks.NAMES)
def test_on_gpu(name):
    code, output = checks.run(name, interpreted=False)
    assert code == 0, output

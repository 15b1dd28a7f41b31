"""The emulator itself: toy kernels that are right must pass, and each kind of mistake must be reported."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import build  # noqa: E402

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
SOURCES = [build.EMULATOR / "toy_kernels.cpp"]


@pytest.fixture(scope="module")
def toys():
    return build.load("toys", SOURCES)


def as_array(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype != torch.float32 else tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tensor_core_matmul_equals_the_product_in_float64(toys, dtype):
    a, b = torch.randn(192, 160).to(dtype), torch.randn(64, 160).to(dtype)
    if dtype == torch.float32:  # the tensor core drops the low 13 bits
        a, b = ((x.view(torch.int32) & -(1 << 13)).view(torch.float32) for x in (a, b))
    product = getattr(toys, f"matmul_{str(dtype)[6:]}")(as_array(a), as_array(b))
    torch.testing.assert_close(torch.from_numpy(product).double(), a.double() @ b.double().T, rtol=0, atol=1e-4)

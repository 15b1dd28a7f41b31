"""Fixtures of the tests of kernels; each test module has a harness.Kernel named KERNEL."""

import harness
import pytest
import toolchain


@pytest.fixture(scope="module")
def builds(request):
    """The kernel's builds that the tests selected need, compiled side by side."""
    if toolchain.unavailable_reason() is not None:
        pytest.skip(toolchain.unavailable_reason())
    selected = [item for item in request.session.items if item.module is request.module]
    parameters = [item.callspec.params if hasattr(item, "callspec") else {} for item in selected]
    names = dict.fromkeys(parameter.get("build", "plain") for parameter in parameters)
    builds = harness.Builds(request.module.KERNEL, names)
    yield builds
    builds.close()


@pytest.fixture(scope="module")
def kernel(builds):
    """The kernel's module, plainly built."""
    return toolchain.load(builds["plain"])

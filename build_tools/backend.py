"""PEP 517 backend: setuptools, building against the torch that is already installed.

pip hides the environment's site-packages from the build. Putting them back (last, so that anything pip
did fetch wins) means `pip install .` neither downloads a second torch nor builds for the wrong one;
where torch is absent it is requested like any other build dependency.
"""

import importlib.util
import sys
import sysconfig

for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
    if path not in sys.path:
        sys.path.append(path)

_REQUIRES = {"setuptools": "setuptools>=77", "torch": "torch>=2.11", "ninja": "ninja"}


def get_requires_for_build_wheel(config_settings=None):
    return [requirement for module, requirement in _REQUIRES.items() if importlib.util.find_spec(module) is None]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel


def __getattr__(name):
    from setuptools import build_meta

    return getattr(build_meta, name)

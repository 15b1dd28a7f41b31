"""The operators. Each is one file: schema, docstring, reference, fake kernel, gradient and autocast rule."""

from .. import _library

_library.load_kernels()  # after the schemas that they implement

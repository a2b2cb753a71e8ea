"""The tiny pair of the pipeline's tests."""

from tests.pipeline.conftest import _pair, place  # noqa: F401

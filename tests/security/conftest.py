"""A synthetic model behind the real API."""

from tests.serving.served import serve  # noqa: F401, a fixture

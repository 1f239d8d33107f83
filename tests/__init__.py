import pytest

pytest.register_assert_rewrite("tests.helpers")  # their asserts say what they compared, as those of test files do

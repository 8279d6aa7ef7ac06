"""The tests of dtem_hf. What is where, and how to run the tests of one family: README.md."""

import pytest


pytest.register_assert_rewrite("tests.support")

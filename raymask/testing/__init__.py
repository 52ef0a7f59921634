"""Contract tests for samplers, scores, allocations, patterns and storage of your own.

Each check is a plain function that raises AssertionError for the first rule that is broken, with a call that shows it.
"""

from raymask.testing.masking import check_allocation, check_pattern, check_sampler, check_score
from raymask.testing.storage import check_storage

__all__ = ["check_allocation", "check_pattern", "check_sampler", "check_score", "check_storage"]

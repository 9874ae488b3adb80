"""`rlhf.rewards.checks.verify_math`, with its library imported when this module is."""

from rlhf.rewards.checks import import_math_verify, verify_math

__all__ = ["verify_math"]

import_math_verify()

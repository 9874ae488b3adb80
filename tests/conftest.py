"""Settings that make mistakes loud, and the places of test data."""

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"  # meshes without accelerators
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # (B,) - (B, 1) is an error, not a (B, B) array

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference numbers and slices of public data that lie beside the checkout, not in it."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip("needs the folder `shared` beside the checkout (reference numbers and data slices)")
    return SHARED

"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real weights and photographs (`SPARSIFY_TEST_DATA`); tests that need it are skipped without it."""
    checkout = Path(__file__).resolve().parent.parent
    folder = (checkout / os.environ.get("SPARSIFY_TEST_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real weights and photographs in {folder} (SPARSIFY_TEST_DATA)")
    return folder

"""One tiny tokenizer for all tests of the folder."""

from pathlib import Path
from typing import Any

import pytest

from tiny_model import make_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return make_tiny_tokenizer(folder)

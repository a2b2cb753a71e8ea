from __future__ import annotations

from typing import Any

import pytest

from tests.data.chats import chat_of


@pytest.fixture(scope="session")
def chat() -> Any:
    return chat_of("chatml")

"""Chat messages as files write them."""

from __future__ import annotations

from typing import Any

from reftune.errors import DataError
from reftune.tasks.files import from_json

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Other names of roles."""
_CHAT = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def chat_messages(given: Any, where: str) -> list[dict[str, str]]:
    """Return chat messages as `role` and `content`, also from JSON text and `from`/`value` form.

    Raises:
        DataError: If they are no list of messages, or one has no text.

    >>> chat_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}], "x")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'}]
    """
    given = from_json(given)
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: the messages are no (JSON) list, or an empty one.", _CHAT)
    messages = []
    for message in given:
        if not isinstance(message, dict):
            raise DataError(f"{where}: the message {message!r} is no object.", _CHAT)
        role, content = message.get("role", message.get("from")), message.get("content")
        content = message.get("value") if content is None else content
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
            raise DataError(f"{where}: the message {str(message)[:80]} cannot be read.", _CHAT)
        messages.append({"role": role, "content": content})
    return messages

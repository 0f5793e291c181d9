"""Messages of a conversation, as raw rows are read, data sets hold them and transformers' templates take them."""

from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
"""Who speaks."""
Message = dict[str, Any]
"""`role` (a `Role`) and `content`; an assistant's may have `reasoning_content`, `tool_calls`, and `weight: 0` if it is
not to be learned; a tool's `name` and `tool_call_id`."""

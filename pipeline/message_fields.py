"""Names that makers of chat messages give to roles and fields; those that say nothing to a model.

Left out: how a message is read (`messages`).
"""

ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response"), "tool"),
    **{name: name for name in ("user", "assistant", "system", "developer", "tool")},
}
"""Speakers, in small letters, under the names that chat templates know; others keep the name that they have."""
CALLING = "function_call"
"""OpenAI's older name for the field with a call."""
CALLERS = (CALLING, "tool_call")
"""Roles of an assistant's turn that is a call, as ShareGPT's and ms-swift's layouts have it."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TRAINED = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
"""Whether to train on a turn; more than one of them have to agree."""
REWARDS = ("reward", "logprob", "logprobs")
"""Of a trajectory's turns."""
METADATA = frozenset(
    [
        "id",
        "uuid",
        "message_id",
        "msg_id",
        "parent_id",
        "parent_message_id",
        "turn_id",
        "turn_identifier",
        "conversation_id",
        "index",
        "turn",
        "timestamp",
        "time",
        "date",
        "created",
        "created_at",
        "created_date",
        "create_time",
        "updated_at",
        "model",
        "model_name",
        "model_provider",
        "openai_id",
        "system_fingerprint",
        "temperature",
        "top_p",
        "user_id",
        "provider",
        "lang",
        "language",
        "country",
        "state",
        "header",
        "hashed_ip",
        "redacted",
        "toxic",
        "token_count",
        "token_counter",
        "num_tokens",
        "tokens",
        "usage",
        "finish_reason",
        "stop_reason",
        "metadata",
        "provider_specific_fields",
        "info",
        "source",
        "status",
        "annotations",
    ]
)
"""Fields that say who made a message, when and where, and nothing that a model reads."""
PART_METADATA = METADATA | {"cache_control", "citations", "signature", "logprobs", "mimeType"}
"""The same of a part of a message's content."""
REPEATED = ("reasoning_details", "thinking_blocks")
"""The thoughts once more, as some services return them."""
WORDS = ("text", "input_text", "output_text")
"""Types of parts that are words."""
ARGUMENTS = {"parameters": "arguments"}
"""Another name of a call's arguments."""
SCHEMA = {"input_schema": "parameters"}
"""Another name of a function's parameters."""

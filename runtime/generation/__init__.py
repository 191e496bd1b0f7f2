"""Generate tokens from prompts: sampling, streaming, chats."""

"""From prompts to generated tokens: sampling, streaming, chats."""

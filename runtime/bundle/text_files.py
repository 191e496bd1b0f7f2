"""Names of a bundle's tokenizer and chat template files; engines do not depend on them."""

from __future__ import annotations

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# Strings with their ids, and conversations with their texts, by which a runtime checks itself.
CHECKS_FILE = "text_checks.json"
TEXT_FILES = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE)
